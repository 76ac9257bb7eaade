"""FT: plain fine-tuning on the defence set."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from rnp.augment import Augment
from rnp.defences.base import Defence, Repaired
from rnp.errors import UserError
from rnp.training import Precision, cross_entropy, fit, steps_per_epoch
from rnp.types import DefenceSet, OnEpoch, ignore


@dataclass(frozen=True, kw_only=True)
class FT(Defence):
    """All weights, cross-entropy, SGD on half a cosine.

    Source: BackdoorBench's `ft` settings (100 epochs, lr .01, cosine), the baseline of Wu et al., NeurIPS 2022.
    Differs: length in steps, so that a smaller defence set gets as many; smaller batches, since there are fewer images.
    """

    lr: Annotated[float, "learning rate at the start"] = 0.01
    momentum: Annotated[float, "SGD momentum"] = 0.9
    weight_decay: Annotated[float, "SGD weight decay"] = 5e-4
    batch_size: Annotated[int, "images per step"] = 64
    steps: Annotated[int, "optimiser steps"] = 800
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = "auto"
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        for name in ("lr", "batch_size", "steps"):
            if not getattr(self, name) > 0:
                raise UserError(f"ft.{name} must be above 0, got {getattr(self, name):g}")

    def repair(self, model: nn.Module, defence_set: DefenceSet, *, rng: torch.Generator, on_epoch: OnEpoch = ignore) -> Repaired:
        tuned, per_epoch = copy.deepcopy(model).train(), steps_per_epoch(len(defence_set.train), self.batch_size)
        optimiser = torch.optim.SGD(tuned.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        fit(tuned, defence_set.train, objective=cross_entropy(tuned), optimiser=optimiser, epochs=self.steps,
            max_steps=self.steps, batch_size=self.batch_size, rng=rng, augment=self.augment, precision=self.precision,
            schedule=lambda epoch: (1 + math.cos(math.pi * min(1.0, epoch * per_epoch / self.steps))) / 2, on_epoch=on_epoch)
        return Repaired(tuned.eval())
