"""Adaptive blend: training images carry random parts of a pattern, some of them under their true
label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import nn

from rnp.attacks.base import Attack, BlendTrigger, noise, waves
from rnp.errors import UserError
from rnp.types import Images, ImageSet, Trigger


@dataclass(frozen=True, kw_only=True)
class AdaptiveBlend(Attack):
    """Drawn at random: the pattern, which images are poisoned, and for each of them and of the
    covers which pieces show.

    Expected: CA near the benign model's, ASR lower than Blend's and different from seed to seed.
    Source: Qi et al., ICLR 2023, Revisiting the assumption of latent separability, section 4.2.
    """

    min_asr = 0.6

    poison_rate: Annotated[float, "share of the whole training set that is poisoned"] = 0.003
    cover_rate: Annotated[
        float, "share of the training set that carries the trigger under its true label"
    ] = 0.003
    alpha: Annotated[float, Interval(gt=0, le=1), "weight of the pattern at test"] = 0.2
    train_alpha: Annotated[float, Interval(gt=0, le=1), "weight of the pattern in training"] = 0.15
    grid_size: Annotated[int, Ge(1), "the pattern is cut into pieces x pieces"] = 4
    visible_fraction: Annotated[
        float, Interval(gt=0, le=1), "share of the pieces that a training image carries"
    ] = 0.5
    pattern: Annotated[
        Literal["noise", "waves"], "uniform noise, or a smooth image that crops hardly change"
    ] = "noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        if round(self.visible_fraction * self.grid_size**2) == 0:
            raise UserError(
                f"visible_fraction {self.visible_fraction:g} of {self.grid_size}x{self.grid_size} pieces rounds to none; raise"
                " shown or pieces"
            )

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> BlendTrigger:
        pattern = {"noise": noise, "waves": waves}[self.pattern](clean.shape, rng=rng)
        return BlendTrigger(pattern, torch.full((1, *pattern.shape[1:]), self.alpha))

    def apply_trigger(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        n, _, height, width = images.shape
        cells = (
            torch.rand(n, self.grid_size**2, generator=rng).argsort(1).argsort(1)
        )  # a random order of pieces per image
        show = (
            (cells < round(self.visible_fraction * self.grid_size**2))
            .float()
            .view(n, 1, self.grid_size, self.grid_size)
        )
        show = F.interpolate(show, size=(height, width), mode="nearest")
        return images + self.train_alpha * show * (trigger.pattern - images)
