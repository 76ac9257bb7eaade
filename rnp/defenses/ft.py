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
    """Fine-tune all weights with cross-entropy and SGD on half a cosine.

    Drawn at random: the order of the images and their augmentation.

    Source: BackdoorBench's `ft` settings (100 epochs, lr 0.01, cosine), the baseline of Wu et al.,
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
        tuned = copy.deepcopy(model)
        return Repaired(self.tune(tuned, defense_set.train, rng=rng, on_epoch=on_epoch))
