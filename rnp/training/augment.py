"""Augmentation of whole batches: random crops and flips, drawn for each image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from rnp.params.ranges import Hyperparameters
from rnp.types import Images, to_device

STEP = 4
"""Sides of shrunk images are multiples of this many pixels, so that a run sees few sizes."""


@dataclass(frozen=True, kw_only=True)
class Augment(Hyperparameters):
    """The usual CIFAR augmentation; `crop=0, flip=False` changes nothing."""

    crop: Annotated[
        int, Ge(0), "largest shift of the random crop, in pixels (padded with zeros)"
    ] = 4
    flip: Annotated[bool, "mirror half of the images"] = True

    def __call__(self, images: Images, *, rng: torch.Generator) -> Images:
        """Drawn at random: one shift and one flip per image. `images` is left unchanged."""
        n, _, height, width = images.shape
        device = images.device
        shifts = torch.randint(-self.crop, self.crop + 1, (2, n), generator=rng)
        flips = torch.zeros(n, dtype=torch.bool)
        if self.flip:
            flips = torch.rand(n, generator=rng) < 0.5
        dy, dx, flipped = to_device(torch.cat([shifts, flips.long().unsqueeze(0)]), device)
        rows = torch.arange(height, device=device) + dy.unsqueeze(1)  # [n, h]
        columns = torch.arange(width, device=device).expand(n, -1)
        columns = torch.where(flipped.bool().unsqueeze(1), columns.flip(1), columns)
        columns = columns + dx.unsqueeze(1)  # [n, w]
        padded = F.pad(images, [self.crop] * 4) if self.crop else images
        index = torch.arange(n, device=device)[:, None, None]
        y = rows[:, :, None] + self.crop
        x = columns[:, None, :] + self.crop
        # The copy is channels-last in memory.
        return padded.permute(0, 2, 3, 1)[index, y, x].permute(0, 3, 1, 2)


def shrink(images: Images, scale: float) -> Float[Tensor, "n c _ _"]:
    """Images whose sides are multiplied by `scale` and rounded down to a multiple of `STEP`.

    Neighboring pixels are averaged. With a scale of 1 or more `images` itself is returned.

    Source: Howard, 2018, DAWNBench entry of fast.ai (progressive resizing).
    """
    if scale >= 1:
        return images
    size = [shrunk_side(side, scale) for side in images.shape[2:]]
    return F.interpolate(images, size=size, mode="bilinear", antialias=True)


def shrunk_side(side: int, scale: float) -> int:
    """A multiple of `STEP`, but never 0 and never more than `side`."""
    multiple = STEP * math.floor(scale * side / STEP + 1e-9)
    return min(side, max(STEP, multiple))
