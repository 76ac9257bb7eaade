"""SIG: a faint sinusoid over images of the target class, which keep their label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from rnp.attacks.base import Add, Attack
from rnp.errors import UserError
from rnp.types import ImageSet


@dataclass(frozen=True, kw_only=True)
class SIG(Attack):
    """Clean-label: only images of the target class are poisoned, at most 80 % of them.

    Drawn at random: which images of the target class are poisoned.
    Source: Barni, Kallas, Tondi, ICIP 2019, arXiv 1902.11237, eq. 1.
    Expected: CA .936 and ASR .971 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 5 %).
    Differs: the wave is added in float, clipped and rounded; public mask files wrap its negative
    half.
    """

    controls = "the poisoned share of the training images, not their labels"
    clean_label = True

    poison_rate: Annotated[float, "share of the whole training set that is poisoned"] = 0.05
    amplitude: Annotated[float, "height of the wave, as a fraction of full scale"] = 40 / 255
    frequency: Annotated[float, "waves per image width"] = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.amplitude <= 1:
            raise UserError(
                f"amplitude must be in (0, 1], got {self.amplitude:g}; it is a fraction of full"
                " scale"
            )
        if not self.frequency > 0:
            raise UserError(f"frequency must be above 0, got {self.frequency:g}")

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Add:
        channels, height, width = clean.shape
        wave = self.amplitude * (2 * math.pi * self.frequency * torch.arange(width) / width).sin()
        return Add(wave.expand(channels, height, width).clone())
