"""WaNet: a fixed, smooth warp of the whole image; covers, if any, are warped at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from rnp.attacks.base import Attack
from rnp.errors import UserError
from rnp.types import Images, ImageSet, Trigger


class Warp(Trigger):
    """Bilinear sampling at the points of `grid` [h, w, 2], each an x and a y in [-1, 1]."""

    grid: Tensor

    def __init__(self, grid: Tensor) -> None:
        super().__init__()
        self.register_buffer("grid", grid)

    def forward(self, images: Images) -> Images:
        grid = self.grid.expand(len(images), *self.grid.shape)
        return F.grid_sample(images, grid, align_corners=True)


@dataclass(frozen=True, kw_only=True)
class WaNet(Attack):
    """Every image is warped by the same field, in training and at test.

    With `cover_rate` above 0 the attack is in noise mode: the warp of each cover gets noise of its
    own, up to half a pixel per sampling point, so that the model reacts to this field alone. The
    paper takes 0.2.

    Drawn at random: the field, which images are poisoned, and the noise of the covers.
    Expected: CA .913 and ASR .897 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 10 %).
    Source: Nguyen and Tran, ICLR 2021, section 3.2.
    Differs: static poisoning, as the RNP family uses it, hence a finer field (k = 32) than the
    official k = 4; without covers it is easier to detect than the original. The noise is drawn
    once, when the set is poisoned, not at each step.
    """

    min_asr = 0.8

    k: Annotated[int, Ge(2), "side of the control grid"] = 32
    strength: Annotated[float, Gt(0), "mean length of the warp, in pixels times 2"] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isinf(self.strength):
            raise UserError(f"wanet.strength must be finite, got {self.strength:g}")

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Warp:
        _, height, width = clean.shape
        field = torch.rand(1, 2, self.k, self.k, generator=rng) * 2 - 1
        field = field / field.abs().mean()
        field = F.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)
        field = field[0].permute(1, 2, 0)  # [h, w, 2]
        lines = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
        y, x = torch.meshgrid(*lines, indexing="ij")
        grid = torch.stack([x, y], dim=2) + self.strength * field / torch.tensor([width, height])
        return Warp(grid.clamp(-1, 1))

    def apply_cover(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        assert isinstance(trigger, Warp)
        n, _, height, width = images.shape
        noise = 2 * torch.rand(n, height, width, 2, generator=rng) - 1
        grid = trigger.grid + noise / torch.tensor([width, height])
        return F.grid_sample(images, grid.clamp(-1, 1), align_corners=True)
