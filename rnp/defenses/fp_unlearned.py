"""FP with the unlearned model: prune features that are dormant on clean images and activate after
unlearning, then fine-tune.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defenses.fp import FP, penultimate_features
from rnp.types import DefenseSet
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class FPUnlearned(FP):
    """Features are pruned by the sum of two ranks: mean activation, and its rise in unlearning.

    The rise alone ranks features high that clean images need, namely those of the classes to
    which predictions drift; pruning would spend the tolerance on them.

    Drawn at random: what unlearning draws, and for the fine-tuning the same numbers as in `fp`.

    Source: Liu et al., RAID 2018 (fine-pruning), for the first rank; Li et al., ICML 2023 (RNP),
    section 3, for the second: a backdoor outlives the clean features. The combination is ours; the
    rise alone was tried on one model (BadNets on `demo`).
    """

    unlearn: Unlearn = Unlearn(until_collapse=False)

    def score(
        self, model: nn.Module, defense_set: DefenseSet, *, rng: torch.Generator
    ) -> Float[Tensor, "d"]:
        """The sum of the two ranks, each from 0; the lowest is pruned first."""
        unlearned = self.unlearn(model, defense_set.train, rng=rng.clone_state()).model
        before = penultimate_features(model, defense_set.all).mean(0)
        after = penultimate_features(unlearned, defense_set.all).mean(0)
        return rank(before) + rank(before - after)


def rank(values: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
    """The position of each value in ascending order, from 0; ties by index."""
    return values.argsort(stable=True).argsort().float()
