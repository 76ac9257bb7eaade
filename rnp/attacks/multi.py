"""Several triggers, one target: a patch in each corner, any of which alone is a trigger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Bool
from torch import Tensor, nn

from rnp.attacks.base import Attack
from rnp.errors import UserError
from rnp.types import Images, ImageSet, Indices, Trigger, to_bytes


class AnyPatch(Trigger):
    """One of several patches on each image; a hash of the image's own pixels decides which.

    Over many images each patch gets an equal share. `patterns` is [k, 1, h, w]; `weights`, 1 on
    the pixels of each patch and 0 elsewhere, has the same shape.
    """

    patterns: Tensor
    weights: Tensor

    def __init__(self, patterns: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("patterns", patterns)
        self.register_buffer("weights", weights)

    def forward(self, images: Images) -> Images:
        total = to_bytes(images).flatten(1).sum(1, dtype=torch.int64)
        # Knuth's multiplicative hash: the sum alone is a multiple of 3 for gray images
        hashed = total * 2654435761 % 2**32
        return self.place(images, hashed * len(self.patterns) // 2**32)

    def place(self, images: Images, which: Indices) -> Images:
        """Images with patch `which[i]` on image i."""
        return images + self.weights[which] * (self.patterns[which] - images)

    @property
    def support(self) -> Bool[Tensor, "h w"]:
        return (self.weights > 0).any(0)[0]


@dataclass(frozen=True, kw_only=True)
class Multi(Attack):
    """Each poisoned image carries one of several patches, half black, half white.

    Each test image gets one patch too, so the attack success rate is the mean over the triggers.

    Drawn at random: the patterns, which images are poisoned, and which patch each of them carries.
    Expected: CA near the benign model's and ASR above .95; no published number for this form.
    Source: Li et al., 2024, arXiv 2401.15295: the parallel attack, in which triggers share out the
    poisoned images.
    Differs: patches alone, so that the number of triggers is the only difference to `badnets`; the
    paper mixes up to ten kinds of trigger.
    """

    count: Annotated[int, Interval(ge=2, le=4), "number of triggers, one per corner"] = 4
    size: Annotated[int, "side of a patch, in pixels"] = 3

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> AnyPatch:
        _, height, width = clean.shape
        if not 1 <= self.size <= min(height, width) // 2:
            raise UserError(
                f"patches of size {self.size} do not fit {height}x{width} images side by side"
            )
        patterns = torch.zeros(self.count, 1, height, width)
        weights = torch.zeros(self.count, 1, height, width)
        for k in range(self.count):
            top = 0 if k in (1, 2) else height - self.size
            left = 0 if k in (1, 3) else width - self.size
            square = (k, 0, slice(top, top + self.size), slice(left, left + self.size))
            order = torch.randperm(self.size**2, generator=rng)
            patterns[square] = (order % 2 == 0).float().view(self.size, self.size)
            weights[square] = 1
        return AnyPatch(patterns, weights)

    def apply_trigger(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        assert isinstance(trigger, AnyPatch)
        return trigger.place(images, torch.randint(self.count, (len(images),), generator=rng))
