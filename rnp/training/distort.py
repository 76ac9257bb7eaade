"""Random distortions of images that do not change what they show; a trigger is one more of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from rnp.types import Images

MAX_BLEND = 0.3
"""Largest weight of the pattern or image that is blended in."""
MAX_SHIFT = 0.1
"""Largest shift of a pixel by a warp, in half sides of the image."""
GRAINS = (1, 2, 4, 8)
"""Sides of the cells of a blended noise pattern, in pixels."""


def distort(images: Images, *, rng: torch.Generator) -> Images:
    """Copies of `images`, each with one distortion of three kinds.

    A rectangle of one color or of noise, a noise pattern or another image blended in, or a smooth
    warp.

    Drawn at random: the kind, and all that belongs to it.

    Source: the rectangles are those of random erasing (Zhong et al., AAAI 2020). The kinds are
    those of published triggers: patches, blended patterns, warps. The combination is ours.
    """
    kind = torch.randint(3, (len(images), 1, 1, 1), generator=rng).to(images.device)
    covered = cover_rectangle(images, rng=rng)
    blended = blend_pattern(images, rng=rng)
    warped = warp(images, rng=rng)
    return torch.where(kind == 0, covered, torch.where(kind == 1, blended, warped))


def cover_rectangle(images: Images, *, rng: torch.Generator) -> Images:
    """Copies of `images` with a rectangle covered in each.

    Half of the rectangles have one random color, a quarter black or white, a quarter noise.

    Drawn at random: the place, shape and content of each rectangle.

    Source: Zhong et al., AAAI 2020 (random erasing).
    Differs: 1 to 16 % of the image; sides of at most 10 : 3, as there.
    """
    n, c, h, w = images.shape
    choice = torch.rand(n, 1, 1, 1, generator=rng)
    inside = random_rectangles(n, h, w, 0.01, 0.16, rng=rng).unsqueeze(1)
    color = torch.rand(n, c, 1, 1, generator=rng)
    extreme = torch.rand(n, 1, 1, 1, generator=rng).round()
    noise = torch.rand(n, c, h, w, generator=rng)
    content = torch.where(choice < 0.25, noise, color)
    content = torch.where(choice > 0.75, extreme, content)
    return torch.where(inside.to(images.device), content.to(images), images)


def random_rectangles(
    n: int, h: int, w: int, least: float, most: float, *, rng: torch.Generator
) -> Bool[Tensor, "n h w"]:
    """The pixels of one random rectangle per image; it has `least` to `most` of the image."""
    area_draw, ratio_draw, top_draw, left_draw = torch.rand(4, n, generator=rng)
    area = (least + (most - least) * area_draw) * h * w
    ratio = torch.exp((2 * ratio_draw - 1) * math.log(10 / 3))
    height = (area * ratio).sqrt().clamp(1, h).floor()
    width = (area / ratio).sqrt().clamp(1, w).floor()
    rows = in_range(torch.arange(h), (top_draw * (h - height + 1)).floor(), height)
    columns = in_range(torch.arange(w), (left_draw * (w - width + 1)).floor(), width)
    return rows.unsqueeze(2) & columns.unsqueeze(1)


def in_range(
    positions: Int64[Tensor, "p"], start: Float[Tensor, "n"], length: Float[Tensor, "n"]
) -> Bool[Tensor, "n p"]:
    """Whether each position is in the range of each row."""
    end = start + length
    return (positions >= start.unsqueeze(1)) & (positions < end.unsqueeze(1))


def blend_pattern(images: Images, *, rng: torch.Generator) -> Images:
    """Blend noise or another image of the batch into each image, with a weight below MAX_BLEND."""
    n, c, h, w = images.shape
    weight = MAX_BLEND * torch.rand(n, 1, 1, 1, generator=rng)
    grain = GRAINS[int(torch.randint(len(GRAINS), (1,), generator=rng))]
    cells = torch.rand(n, c, math.ceil(h / grain), math.ceil(w / grain), generator=rng)
    noise = F.interpolate(cells, size=(h, w), mode="bilinear" if grain > 2 else "nearest")
    others = images[torch.randint(n, (n,), generator=rng).to(images.device)]
    is_noise = torch.rand(n, 1, 1, 1, generator=rng) < 0.5
    pattern = torch.where(is_noise.to(images.device), noise.to(images), others)
    return images.lerp(pattern, weight.to(images))


def warp(images: Images, *, rng: torch.Generator) -> Images:
    """Shift the pixels of each image by a smooth random field of at most MAX_SHIFT."""
    n, _, h, w = images.shape
    strength = MAX_SHIFT * torch.rand(n, 1, 1, 1, generator=rng)
    coarse = 2 * torch.rand(n, 2, 4, 4, generator=rng) - 1
    field = F.interpolate(coarse, size=(h, w), mode="bicubic", align_corners=True)
    identity = F.affine_grid(torch.eye(2, 3).expand(n, 2, 3), [n, 1, h, w], align_corners=True)
    grid = (identity + strength * field.permute(0, 2, 3, 1)).clamp(-1, 1)
    return F.grid_sample(images, grid.to(images), align_corners=True)
