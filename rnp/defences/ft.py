"""FT: plain fine-tuning on the defence set."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from rnp.defences.base import Repaired, TuningDefence
from rnp.types import DefenceSet, OnEpoch, ignore


@dataclass(frozen=True, kw_only=True)
class FT(TuningDefence):
    """All weights, cross-entropy, SGD on half a cosine.

    Source: BackdoorBench's `ft` settings (100 epochs, lr .01, cosine), the baseline of Wu et al.,
    NeurIPS 2022.
    Differs: length in steps, so that a smaller defence set gets as many; smaller batches, since
    there are fewer images.
    """

    def repair(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> Repaired:
        return Repaired(
            self.tune(copy.deepcopy(model), defence_set.train, rng=rng, on_epoch=on_epoch)
        )
