"""A small U-Net as functions of its weights, so that triggers can keep those in buffers."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rnp.types import Images

DEPTH = 3  # how often the image is halved


def draw_unet(
    inputs: int,
    outputs: int,
    width: int,
    *,
    rng: torch.Generator,
    device: torch.device,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Fresh weights for `unet`, which require gradients. Each halving of the image doubles the
    channels, from `width`.
    """
    down = [inputs, *(width * 2**i for i in range(DEPTH))]
    up = [*reversed(down[1:-1]), outputs]
    shapes = [
        *itertools.pairwise(down),
        *((below + skip, out) for below, skip, out in zip(down[::-1], down[-2::-1], up)),
    ]
    weights = {}
    for i, (into, out) in enumerate(shapes):
        weights[f"{prefix}weight{i}"] = torch.randn(out, into, 3, 3, generator=rng) * math.sqrt(
            2 / (9 * into)
        )
        weights[f"{prefix}bias{i}"] = torch.zeros(out)
    return {name: value.to(device).requires_grad_() for name, value in weights.items()}


def unet(
    images: Images,
    weights: dict[str, Tensor],
    *,
    prefix: str = "",
    border: Literal["constant", "replicate"] = "constant",
) -> Tensor:
    """Unbounded values in the size of the images, [n, outputs, h, w]. No BatchNorm: each image is
    treated alone.

    `border` is how images go on beyond their edge: zeros tell the network where the edge is,
    repeated pixels do not.
    """

    def convolve(x: Tensor, i: int, stride: int) -> Tensor:
        return F.conv2d(
            F.pad(x, [1] * 4, border),
            weights[f"{prefix}weight{i}"],
            weights[f"{prefix}bias{i}"],
            stride,
        )

    x, skips = images - 0.5, []
    for i in range(DEPTH):
        skips.append(x)
        x = convolve(x, i, 2).relu()
    for i in range(DEPTH, 2 * DEPTH):
        x = F.interpolate(x.relu(), size=skips[-1].shape[2:])
        x = convolve(torch.cat([x, skips.pop()], 1), i, 1)
    return x.float()
