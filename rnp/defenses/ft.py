"""FT: plain fine-tuning on the defense set."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from rnp.defenses.base import Repaired, TuningDefense
from rnp.types import DefenseSet, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class FT(TuningDefense):
    """All weights, cross-entropy, SGD on half a cosine.

    Source: BackdoorBench's `ft` settings (100 epochs, lr .01, cosine), the baseline of Wu et al.,
    NeurIPS 2022.
    Differs: length in steps, so that a smaller defense set gets as many; smaller batches, since
    there are fewer images.
    """

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        return Repaired(
            self.tune(copy.deepcopy(model), defense_set.train, rng=rng, on_epoch=on_epoch)
        )
