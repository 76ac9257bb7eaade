"""Blend: a fixed colour image shines through every pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from rnp.attacks.base import Attack, Mix
from rnp.errors import UserError
from rnp.types import ImageSet


@dataclass(frozen=True, kw_only=True)
class Blend(Attack):
    """Drawn at random: the pattern.

    Expected: CA .935 and ASR .999 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 10 %).
    Source: Chen et al., 2017, arXiv 1712.05526.
    Differs: the pattern is generated, since the cartoon picture of public code is not free.
    """

    alpha: Annotated[float, "weight of the pattern, in training and at test"] = 0.2
    pattern: Annotated[Literal["noise", "waves"], "uniform noise, or a smooth image that crops hardly change"] = "noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise UserError(f"alpha must be in (0, 1], got {self.alpha:g}")

    def make_trigger(self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None) -> Mix:
        make = {"noise": noise, "waves": waves}[self.pattern]
        pattern = make(clean.shape, rng=rng)
        return Mix(pattern, torch.full((1, *pattern.shape[1:]), self.alpha))


def noise(shape: tuple[int, int, int], *, rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng)


def waves(shape: tuple[int, int, int], *, rng: torch.Generator, count: int = 8) -> Tensor:
    """A sum of `count` random cosines of low frequency per channel, stretched to [0, 1]."""
    channels, height, width = shape
    y = torch.arange(height).view(1, 1, -1, 1) / height
    x = torch.arange(width).view(1, 1, 1, -1) / width
    fy, fx = (torch.randint(-4, 5, (2, channels, count, 1, 1), generator=rng)).float()
    phase = torch.rand(channels, count, 1, 1, generator=rng)
    image = (2 * math.pi * (fy * y + fx * x + phase)).cos().sum(1)  # [c, h, w]
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return (image - low) / (high - low).clamp_min(1e-6)
