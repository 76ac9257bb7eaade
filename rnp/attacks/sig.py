"""SIG: a faint sinusoid is added to images of the target class, which keep their label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from torch import nn

from rnp.attacks.base import AdditiveTrigger, Attack, PoisonRate
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

    threat_model = "the poisoned share of the training images, not their labels"
    clean_label = True

    poison_rate: PoisonRate = 0.05
    amplitude: Annotated[
        float, Interval(gt=0, le=1), "height of the wave, as a fraction of full scale"
    ] = 40 / 255
    frequency: Annotated[float, Gt(0), "waves per image width"] = 6

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> AdditiveTrigger:
        channels, height, width = clean.shape
        wave = self.amplitude * (2 * math.pi * self.frequency * torch.arange(width) / width).sin()
        return AdditiveTrigger(wave.expand(channels, height, width).clone())
