"""BppAttack: colors reduced to a few levels, with Floyd-Steinberg dithering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import Tensor, nn

from rnp.attacks.base import Attack
from rnp.types import Images, ImageSet, Trigger

DIFFUSION = ((0, 1, 7 / 16), (1, -1, 3 / 16), (1, 0, 5 / 16), (1, 1, 1 / 16))
"""Neighbors that receive the error of a pixel: rows down, columns right, share of the error."""


class Quantize(Trigger):
    """Each pixel becomes the nearest of `levels` values; its error is passed on to neighbors.

    `levels` is a number, [].
    """

    levels: Tensor

    def __init__(self, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)

    def forward(self, images: Images) -> Images:
        n, channels, height, width = images.shape
        steps = self.levels - 1
        # the border receives errors that leave the image
        canvas = images.new_zeros(height + 1, width + 2, n * channels)
        canvas[:height, 1:-1] = images.permute(2, 3, 0, 1).flatten(2)
        # pixels two columns and one row apart do not depend on each other and are done together
        for step in range(width + 2 * height - 2):
            row = torch.arange(max(0, (step - width + 2) // 2), min(height - 1, step // 2) + 1)
            column = step - 2 * row + 1
            wanted = canvas[row, column]
            level = (wanted * steps).round_().div_(steps).clamp_(0, 1)
            error = wanted - level
            canvas[row, column] = level
            for down, right, share in DIFFUSION:
                canvas[row + down, column + right] += error * share
        return canvas[:height, 1:-1].unflatten(2, (n, channels)).permute(2, 3, 0, 1).contiguous()


@dataclass(frozen=True, kw_only=True)
class Bpp(Attack):
    """The change differs from image to image; covers carry the quantization error of another one.

    Drawn at random: which images are poisoned.
    Expected: CA near the benign model's and ASR above .95 where training is plain; no published
    number for this form.
    Source: Wang, Zhai, Ma, CVPR 2022, arXiv 2205.13383: palette of 8 levels per channel, dithered;
    its negative samples, which get the quantization noise of other images and keep their labels,
    are the covers (about 0.2 there).
    Differs: static poisoning with plain training; the contrastive adversarial training of the
    paper is left out.
    """

    bits: Annotated[int, Interval(ge=1, le=7), "bits per channel that remain; 3 make 8 levels"] = 3

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Quantize:
        return Quantize(torch.tensor(2.0**self.bits))

    def apply_cover(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        noise = trigger(images) - images
        return (images + noise.roll(1, 0)).clamp(0, 1)
