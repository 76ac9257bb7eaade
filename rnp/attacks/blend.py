"""Blend: a fixed color image is blended into every image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import nn

from rnp.attacks.base import Attack, BlendTrigger, noise, waves
from rnp.types import ImageSet


@dataclass(frozen=True, kw_only=True)
class Blend(Attack):
    """A pattern covers the whole image, with the same weight at every pixel.

    Drawn at random: the pattern, and which images are poisoned.
    Expected: CA .935 and ASR .999 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 10 %).
    Source: Chen et al., 2017, arXiv 1712.05526.
    Differs: the pattern is generated, since the cartoon picture of public code is not free.
    """

    alpha: Annotated[
        float, Interval(gt=0, le=1), "weight of the pattern, in training and at test"
    ] = 0.2
    pattern: Annotated[
        Literal["noise", "waves"], "uniform noise, or a smooth image that crops hardly change"
    ] = "noise"

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> BlendTrigger:
        make_pattern = noise if self.pattern == "noise" else waves
        pattern = make_pattern(clean.shape, rng=rng)
        return BlendTrigger(pattern, torch.full((1, *pattern.shape[1:]), self.alpha))
