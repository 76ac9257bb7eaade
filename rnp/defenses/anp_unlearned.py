"""ANP with the unlearned model: the same masks, found where clean features are gone; cut from the
given model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rnp.defenses.anp import ANP
from rnp.types import DefenseSet, NeuronMask, OnEpoch, no_callback
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class ANPUnlearned(ANP):
    """Masks on the scales of the unlearned model that bring clean images back under the worst
    change of scales and biases.

    With `epsilon` 0 the ranking is that of RNP's recovery with as many steps of the same size, so
    that the two differ by the adversary alone. `on_epoch` hears of the masks only. The masks draw
    what they draw in `anp`.

    Source: Wu and Wang, NeurIPS 2021 (ANP), for the masks; Li et al., ICML 2023 (RNP), for where
    they are sought. The union is ours.
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
        unlearned = self.unlearn(model, defense_set.train, rng=rng.clone_state()).model
        return super().score(unlearned, defense_set, rng=rng, on_epoch=on_epoch)
