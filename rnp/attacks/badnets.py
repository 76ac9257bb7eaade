"""BadNets: a small black and white patch in the lower right corner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from rnp.attacks.base import Attack, BlendTrigger, checkerboard
from rnp.types import ImageSet


@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """The patch is a fixed checkerboard, the same in all channels.

    Drawn at random: which images are poisoned.
    Source: Gu et al., 2017, arXiv 1708.06733.
    Expected: CA .913 and ASR .950 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 10 %).
    Differs: the reference patch of RNP has one black pixel where a checkerboard has a white one;
    ours is regular.
    """

    size: Annotated[int, "side of the patch, in pixels"] = 3
    margin: Annotated[int, "pixels between patch and border"] = 0

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> BlendTrigger:
        return checkerboard(clean.shape, self.size, self.margin)
