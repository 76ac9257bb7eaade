"""Augmentation of whole batches: shifted crops and mirror images, every image with its own draw."""

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

STEP = 4  # pixels, so that a run sees few sizes


@dataclass(frozen=True, kw_only=True)
class Augment(Hyperparameters):
    """The usual CIFAR augmentation; `crop=0, flip=False` changes nothing."""

    crop: Annotated[
        int, Ge(0), "largest shift of the random crop, in pixels (padded with zeros)"
    ] = 4
    flip: Annotated[bool, "mirror half of the images"] = True

    def __call__(self, images: Images, *, rng: torch.Generator) -> Images:
        """Drawn at random: one shift and one mirroring per image. `images` is left unchanged."""
        n, _, height, width = images.shape
        dy, dx = torch.randint(-self.crop, self.crop + 1, (2, n), generator=rng)
        mirrored = (
            torch.rand(n, generator=rng) < 0.5 if self.flip else torch.zeros(n, dtype=torch.bool)
        )
        dy, dx, mirrored = to_device(torch.stack([dy, dx, mirrored.long()]), images.device)

        def count(end):
            return torch.arange(end, device=images.device)

        rows = count(height) + dy.unsqueeze(1)  # [n, h]
        columns = count(width).expand(n, -1)
        columns = torch.where(
            mirrored.bool().unsqueeze(1), columns.flip(1), columns
        ) + dx.unsqueeze(1)  # [n, w]
        padded = F.pad(images, [self.crop] * 4) if self.crop else images
        where = (
            count(n)[:, None, None],
            rows[:, :, None] + self.crop,
            columns[:, None, :] + self.crop,
        )
        return padded.permute(0, 2, 3, 1)[where].permute(0, 3, 1, 2)  # channels-last in memory


def shrink(images: Images, share: float) -> Float[Tensor, "n c _ _"]:
    """Smaller images, their sides `share` of what they were, down to a multiple of `STEP` pixels;
    the same ones where `share` is 1.

    Neighboring pixels are averaged. What convolutions learn on smaller images serves on large
    ones, at a fraction of the cost.

    Source: Howard, 2018, DAWNBench entry of fast.ai (images that grow in training).
    """
    if share >= 1:
        return images
    sides = [
        min(side, max(STEP, STEP * math.floor(share * side / STEP + 1e-9)))
        for side in images.shape[2:]
    ]
    return F.interpolate(images, size=sides, mode="bilinear", antialias=True)
