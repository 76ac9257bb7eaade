"""FP with the unlearned model: prune the features that sleep on clean images and wake when these
are forgotten, then fine-tune.
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
    """The order of the features is that of the sum of two ranks: by mean activation, as in `fp`,
    and by its rise in unlearning.

    Rise alone leads to the features of the classes to which clean images drift, which clean images
    need: the tolerance is spent on them. The fine-tuning draws what it draws in `fp`.

    Source: Liu et al., RAID 2018 (fine-pruning), for the first rank; Li et al., ICML 2023 (RNP),
    section 3, for what the second rests on: a backdoor outlives the clean features. The union is
    ours; rise alone was tried on one model (BadNets on `demo`).
    """

    unlearn: Unlearn = Unlearn(until_collapse=False)

    def score(
        self, model: nn.Module, defense_set: DefenseSet, *, rng: torch.Generator
    ) -> Float[Tensor, "d"]:
        """Lowest first: the sum of the ranks, each from 0."""
        unlearned = self.unlearn(model, defense_set.train, rng=rng.clone_state()).model
        before, after = (
            penultimate_features(net, defense_set.all).mean(0) for net in (model, unlearned)
        )
        return rank(before) + rank(before - after)


def rank(values: Float[Tensor, "d"]) -> Float[Tensor, "d"]:
    """The place of each value in ascending order, from 0; ties by position."""
    return values.argsort(stable=True).argsort().float()
