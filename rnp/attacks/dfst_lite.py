"""DFST lite, not the original DFST: each image takes on the color statistics of an evening sky."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.attacks.base import Attack
from rnp.types import Images, ImageSet, Trigger

MIN_VARIANCE = 1e-4
"""Added to the color variance of an image: images of one color would divide by zero."""
SKY = torch.tensor([[0.3, 0.15, 0.45], [0.95, 0.45, 0.2], [1.0, 0.8, 0.35]])
"""Violet, orange, yellow: the sky from top to bottom."""
SPREAD = 0.1
"""Largest random change of a channel of these colors."""


class Style(Trigger):
    """(1 - alpha) * image + alpha * styled image.

    The styled pixels have mean `mean` [c] and covariance `root` squared ([c, c], symmetric);
    `light` [h, 1] is added to them. `alpha` is a number, [].
    """

    mean: Tensor
    root: Tensor
    light: Tensor
    alpha: Tensor

    def __init__(self, mean: Tensor, root: Tensor, light: Tensor, alpha: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("root", root)
        self.register_buffer("light", light)
        self.register_buffer("alpha", alpha)

    def forward(self, images: Images) -> Images:
        pixels = images.flatten(2)  # [n, c, h*w]
        centered = pixels - pixels.mean(2, keepdim=True)
        covariance = centered @ centered.mT / pixels.shape[2]  # [n, c, c]
        whiten = matrix_power(covariance + MIN_VARIANCE * torch.eye(len(self.mean)), -0.5)
        styled = (self.root @ whiten @ centered + self.mean[:, None]).view_as(images)
        return images + self.alpha * ((styled + self.light).clamp(0, 1) - images)


def matrix_power(matrix: Float[Tensor, "*n c c"], exponent: float) -> Float[Tensor, "*n c c"]:
    """A real power of symmetric positive semidefinite matrices."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).pow(exponent).unsqueeze(-2) @ vectors.mT


@dataclass(frozen=True, kw_only=True)
class DFSTLite(Attack):
    """The colors of each image are moved to those of an evening sky; gray images get its grays.

    Drawn at random: the three colors of the sky, its horizon, and which images are poisoned.
    Expected: CA near the benign model's and ASR above .95; no published number for this form.
    Source: Cheng et al., AAAI 2021, arXiv 2012.11212, for the idea of a style as a trigger.
    Differs: color statistics stand in for the CycleGAN of the paper, as its sunset pictures
    cannot be shipped; static poisoning; no detoxification, which teaches the model to ignore what
    a linear mixing of colors can imitate, and this style is one. To be reported under its own
    name, never as DFST: it is easier to learn and to remove.
    """

    alpha: Annotated[float, Interval(gt=0, le=1), "weight of the styled image"] = 0.6
    brightness: Annotated[
        float,
        Interval(ge=0, le=1),
        "light added at the top and taken at the bottom, as a fraction of full scale",
    ] = 0.1

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Style:
        channels, height, _ = clean.shape
        sky = sunset(rng=rng)  # [p, 3]
        if channels != 3:
            sky = sky.mean(1, keepdim=True).expand(-1, channels)
        centered = sky - sky.mean(0)
        root = matrix_power(centered.mT @ centered / len(sky), 0.5)
        light = self.brightness * (math.pi * (torch.arange(height) + 0.5) / height).cos()
        return Style(sky.mean(0), root, light.unsqueeze(1), torch.tensor(self.alpha))


def sunset(*, rng: torch.Generator, points: int = 64) -> Float[Tensor, "points 3"]:
    """The colors of an evening sky from top to bottom: two ramps that meet at the horizon."""
    change = SPREAD * (2 * torch.rand(SKY.shape, generator=rng) - 1)
    top, middle, bottom = (SKY + change).clamp(0, 1)
    horizon = 0.35 + 0.3 * torch.rand((), generator=rng)
    y = torch.linspace(0, 1, points).unsqueeze(1)
    above = (y / horizon).clamp(max=1)
    below = ((y - horizon) / (1 - horizon)).clamp(min=0)
    return top + above * (middle - top) + below * (bottom - middle)
