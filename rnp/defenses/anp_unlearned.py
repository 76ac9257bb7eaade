"""ANP with the unlearned model: masks are optimized there, and the given model is pruned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rnp.defenses.anp import ANP
from rnp.types import DefenseSet, NeuronMask, OnEpoch, no_callback
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class ANPUnlearned(ANP):
    """Masks that recover the unlearned model under the worst change of its scales and biases.

    With `epsilon` 0 the ranking is that of RNP's recovery with as many steps of the same size, so
    that the two differ by the adversary alone.

    Drawn at random: what unlearning draws, and for the masks the same numbers as in `anp`.

    Source: Wu and Wang, NeurIPS 2021 (ANP), for the masks; Li et al., ICML 2023 (RNP), for the
    unlearned model. The combination is ours.
    """

    unlearn: Unlearn = Unlearn(until_collapse=False)

    def score(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> NeuronMask:
        """The mask averaged over the steps; `on_epoch` receives the masks' epochs only."""
        unlearned = self.unlearn(model, defense_set.train, rng=rng.clone_state()).model
        return super().score(unlearned, defense_set, rng=rng, on_epoch=on_epoch)
