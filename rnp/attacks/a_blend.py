"""Adaptive blend: training images carry random parts of a pattern, some of them under their true
label.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import nn

from rnp.attacks.base import Attack, Mix, noise, waves
from rnp.errors import UserError
from rnp.types import Images, ImageSet, Trigger


@dataclass(frozen=True, kw_only=True)
class ABlend(Attack):
    """Drawn at random: the pattern, which images are poisoned, and for each of them and of the
    covers which pieces show.

    Expected: CA near the twin's, ASR lower than Blend's and different from seed to seed.
    Source: Qi et al., ICLR 2023, Revisiting the assumption of latent separability, section 4.2.
    """

    gate = 0.6

    poison_rate: Annotated[float, "share of the whole training set that is poisoned"] = 0.003
    cover_rate: Annotated[
        float, "share of the training set that carries the trigger under its true label"
    ] = 0.003
    alpha: Annotated[float, "weight of the pattern at test"] = 0.2
    train_alpha: Annotated[float, "weight of the pattern in training"] = 0.15
    pieces: Annotated[int, "the pattern is cut into pieces x pieces"] = 4
    shown: Annotated[float, "share of the pieces that a training image carries"] = 0.5
    pattern: Annotated[
        Literal["noise", "waves"], "uniform noise, or a smooth image that crops hardly change"
    ] = "noise"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "train_alpha", "shown"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} must be in (0, 1], got {getattr(self, name):g}")
        if self.pieces < 1:
            raise UserError(f"pieces must be at least 1, got {self.pieces}")
        if round(self.shown * self.pieces**2) == 0:
            raise UserError(
                f"shown {self.shown:g} of {self.pieces}x{self.pieces} pieces rounds to none; raise"
                " shown or pieces"
            )

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Mix:
        pattern = {"noise": noise, "waves": waves}[self.pattern](clean.shape, rng=rng)
        return Mix(pattern, torch.full((1, *pattern.shape[1:]), self.alpha))

    def stamp(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        n, _, height, width = images.shape
        cells = (
            torch.rand(n, self.pieces**2, generator=rng).argsort(1).argsort(1)
        )  # a random order of pieces per image
        show = (
            (cells < round(self.shown * self.pieces**2))
            .float()
            .view(n, 1, self.pieces, self.pieces)
        )
        show = F.interpolate(show, size=(height, width), mode="nearest")
        return images + self.train_alpha * show * (trigger.pattern - images)
