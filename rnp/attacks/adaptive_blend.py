"""Adaptive blend: training images carry random parts of a pattern; covers keep their true label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import nn

from rnp.attacks.base import Attack, BlendTrigger, CoverRate, PoisonRate, noise, waves
from rnp.errors import UserError
from rnp.types import Images, ImageSet, Trigger


@dataclass(frozen=True, kw_only=True)
class AdaptiveBlend(Attack):
    """Blend whose pattern is cut into a grid; each training image carries some cells of it.

    Drawn at random: the pattern, which images are poisoned, and for each of them and of the covers
    which cells are visible.
    Expected: CA near the benign model's, ASR lower than Blend's and different from seed to seed.
    Source: Qi et al., ICLR 2023, Revisiting the assumption of latent separability, section 4.2.
    """

    min_asr = 0.6

    poison_rate: PoisonRate = 0.003
    cover_rate: CoverRate = 0.003
    alpha: Annotated[float, Interval(gt=0, le=1), "weight of the pattern at test"] = 0.2
    train_alpha: Annotated[float, Interval(gt=0, le=1), "weight of the pattern in training"] = 0.15
    grid_size: Annotated[int, Ge(1), "cells along each side of the pattern"] = 4
    visible_fraction: Annotated[
        float, Interval(gt=0, le=1), "share of the cells that a training image carries"
    ] = 0.5
    pattern: Annotated[
        Literal["noise", "waves"], "uniform noise, or a smooth image that crops hardly change"
    ] = "noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.visible_cells == 0:
            raise UserError(
                f"visible_fraction {self.visible_fraction:g} of {self.grid_size}x{self.grid_size}"
                " cells rounds to none; raise visible_fraction or grid_size"
            )

    @property
    def visible_cells(self) -> int:
        """The number of cells that a training image carries."""
        return round(self.visible_fraction * self.grid_size**2)

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> BlendTrigger:
        make_pattern = noise if self.pattern == "noise" else waves
        pattern = make_pattern(clean.shape, rng=rng)
        return BlendTrigger(pattern, torch.full((1, *pattern.shape[1:]), self.alpha))

    def apply_trigger(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        assert isinstance(trigger, BlendTrigger)
        n, _, height, width = images.shape
        order = torch.rand(n, self.grid_size**2, generator=rng).argsort(1).argsort(1)
        visible = (order < self.visible_cells).float()  # [n, cells]
        visible = visible.view(n, 1, self.grid_size, self.grid_size)
        visible = F.interpolate(visible, size=(height, width), mode="nearest")  # [n, 1, h, w]
        return images + self.train_alpha * visible * (trigger.pattern - images)
