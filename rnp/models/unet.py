"""A small U-Net as functions of its weights, because triggers keep these in buffers."""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rnp.types import Images

DEPTH = 3
"""How often the image is halved."""


def draw_unet(
    inputs: int,
    outputs: int,
    width: int,
    *,
    rng: torch.Generator,
    device: torch.device,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Fresh weights for `unet`, by name after `prefix`; they require gradients.

    The first halving makes `width` channels, each further one doubles them.
    """
    down = [inputs, *(width * 2**i for i in range(DEPTH))]
    up = [*reversed(down[1:-1]), outputs]
    shapes = [
        *itertools.pairwise(down),
        *((below + skip, out) for below, skip, out in zip(down[::-1], down[-2::-1], up)),
    ]
    weights = {}
    for i, (channels, out) in enumerate(shapes):
        scale = math.sqrt(2 / (9 * channels))
        weights[f"{prefix}weight{i}"] = torch.randn(out, channels, 3, 3, generator=rng) * scale
        weights[f"{prefix}bias{i}"] = torch.zeros(out)
    return {name: value.to(device).requires_grad_() for name, value in weights.items()}


def unet(
    images: Images,
    weights: dict[str, Tensor],
    *,
    prefix: str = "",
    border: Literal["constant", "replicate"] = "constant",
) -> Float[Tensor, "n outputs h w"]:
    """Unbounded values in the size of the images. No BatchNorm: each image is treated alone.

    `border` is the padding: zeros show the network where the edge is, repeated pixels do not.
    """

    def convolve(x: Tensor, i: int, stride: int) -> Tensor:
        padded = F.pad(x, [1] * 4, border)
        return F.conv2d(padded, weights[f"{prefix}weight{i}"], weights[f"{prefix}bias{i}"], stride)

    x = images - 0.5
    skips = []
    for i in range(DEPTH):
        skips.append(x)
        x = convolve(x, i, 2).relu()
    for i in range(DEPTH, 2 * DEPTH):
        x = F.interpolate(x.relu(), size=skips[-1].shape[2:])
        x = convolve(torch.cat([x, skips.pop()], 1), i, 1)
    return x.float()
