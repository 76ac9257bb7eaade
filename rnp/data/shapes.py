"""Generated images: outlines of random place, size, angle and color on textured backgrounds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from rnp.data.base import Dataset
from rnp.types import Bytes, ImageSet, Labels, to_bytes

POLYGONS = {
    "triangle": [(i / 3, 1.0) for i in range(3)],
    "square": [(i / 4, 1.0) for i in range(4)],
    "propeller": [
        *((0.04, 1.0), (-0.04, 1.0), (-0.11, 0.32), (-0.29, 0.32), (-0.29, 1.0)),
        *((-0.21, 1.0), (0.21, 1.0), (0.29, 1.0), (0.29, 0.32), (0.11, 0.32)),
    ],
    "star": [(i / 10, 1.0 if i % 2 == 0 else 0.42) for i in range(10)],
    "cross": [
        (a, r)
        for i in range(4)
        for a, r in ((i / 4 - 0.05, 1.0), (i / 4 + 0.05, 1.0), (i / 4 + 0.125, 0.44))
    ],
    "arrow": [(0.0, 1.0), (0.36, 1.0), (0.5, 0.25), (0.64, 1.0)],
    "bar": [(0.04, 1.0), (0.46, 1.0), (0.54, 1.0), (0.96, 1.0)],
    "moon": [(i / 16, 1.0) for i in range(2, 15)] + [(0.62, 0.6), (0.5, 0.3), (0.38, 0.6)],
}
"""Vertices of the outlines as (angle in turns, distance from the center)."""
CLASSES = (*POLYGONS, "disc", "ring")
"""The last two are drawn by formula."""


@dataclass(frozen=True, kw_only=True)
class Shapes(Dataset):
    """Ten balanced classes of outlines, made for a demonstration that needs no download.

    Drawn at random: everything about an image but its class.
    """

    train: Annotated[int, Ge(1), "training images to generate"] = 6000
    test: Annotated[int, Ge(1), "test images to generate"] = 2000
    size: Annotated[int, Ge(8), "side of an image, in pixels"] = 32
    noise: Annotated[
        float, Ge(0), "strength of the background texture and of the pixel noise, in full scale"
    ] = 0.15

    def load(self, root: Path, *, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        return self._draw(self.train, rng), self._draw(self.test, rng)

    def _draw(self, n: int, rng: torch.Generator) -> ImageSet:
        labels = torch.arange(n) % len(CLASSES)
        labels = labels[torch.randperm(n, generator=rng)]
        images = torch.cat([self._paint(part, rng) for part in labels.split(1000)])
        return ImageSet(images, labels, CLASSES)

    def _paint(self, labels: Labels, rng: torch.Generator) -> Bytes:
        n = len(labels)
        size = self.size
        cover = draw_outlines(labels, size, rng)
        texture = torch.zeros(n, 3, size, size)
        for side in (3, 6, 12):
            coarse = torch.rand(n, 3, side, side, generator=rng) - 0.5
            texture += F.interpolate(coarse, size=size, mode="bilinear")
        ground = torch.rand(n, 3, 1, 1, generator=rng)
        # far from the ground in each channel
        ink = (ground + 0.35 + 0.3 * torch.rand(n, 3, 1, 1, generator=rng)) % 1.0
        noise = torch.randn(n, 3, size, size, generator=rng) * self.noise / 4
        image = ground + self.noise * texture
        image = image + (ink + self.noise / 2 * texture.flip(3) - image) * cover + noise
        return to_bytes(image)


def draw_outlines(labels: Labels, size: int, rng: torch.Generator) -> Float[Tensor, "n 1 h w"]:
    """How much of each pixel the shape covers, with one pixel of soft edge.

    Drawn at random: angle, radius and place of each shape.
    """
    n = len(labels)

    def draw(low: float, high: float) -> Float[Tensor, "n 1 1"]:
        return low + (high - low) * torch.rand(n, 1, 1, generator=rng)

    line = (torch.arange(size) + 0.5) / size * 2 - 1  # pixel centers in [-1, 1]
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle = draw(0, 2 * math.pi)
    radius = draw(0.5, 0.8)
    dx = x - draw(-0.2, 0.2)  # [n, h, w]
    dy = y - draw(-0.2, 0.2)
    u = (dx * angle.cos() + dy * angle.sin()) / radius
    v = (dy * angle.cos() - dx * angle.sin()) / radius
    distances = torch.stack([signed_distance(name, u, v) for name in CLASSES])  # [k, n, h, w]
    distance = distances[labels, torch.arange(n)]
    return (0.5 - distance * radius * size / 2).clamp(0, 1).unsqueeze(1)


def signed_distance(
    name: str, u: Float[Tensor, "*points"], v: Float[Tensor, "*points"]
) -> Float[Tensor, "*points"]:
    """The distance of each point from the outline, negative inside, in radii of the shape."""
    if name == "disc":
        return (u * u + v * v).sqrt() - 0.85
    if name == "ring":
        return ((u * u + v * v).sqrt() - 0.72).abs() - 0.2
    corners = [
        (r * math.cos(2 * math.pi * a), r * math.sin(2 * math.pi * a)) for a, r in POLYGONS[name]
    ]
    nearest = torch.full_like(u, torch.inf)
    inside = torch.zeros_like(u, dtype=torch.bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        ex = bx - ax
        ey = by - ay
        t = (((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey)).clamp(0, 1)
        nearest = torch.minimum(nearest, (u - ax - t * ex) ** 2 + (v - ay - t * ey) ** 2)
        if ay != by:  # count crossings of a ray to the right
            crosses = (v < ay) != (v < by)
            inside ^= crosses & (u < (v - ay) / ey * ex + ax)
    return torch.where(inside, -1.0, 1.0) * nearest.sqrt()
