"""scikit-learn's handwritten digits, enlarged and coloured: 1,797 images that need no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F

from rnp.data.base import Dataset, interleave
from rnp.errors import UserError
from rnp.types import ImageSet, to_bytes


@dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
    """Ten digits of 8 by 8 pixels, enlarged bicubically, each in a random colour on a random
    darker one.

    Source: Alpaydin and Kaynak, 1998, UCI optical recognition of handwritten digits, test part, as
    in scikit-learn.
    """

    size: Annotated[int, "side of an image, in pixels"] = 32
    test_share: Annotated[float, "share of the images that form the test set"] = 0.3

    def __post_init__(self) -> None:
        if self.size < 8:
            raise UserError(f"digits.size must be at least 8 pixels, got {self.size}")
        if not 0 < self.test_share < 1:
            raise UserError(f"digits.test_share must be in (0, 1), got {self.test_share:g}")

    def load(self, root: Path, *, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        strokes = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)
        strokes = F.interpolate(strokes, size=self.size, mode="bicubic", align_corners=False).clamp(
            0, 1
        )
        n = len(strokes)
        ink = 0.5 + 0.5 * torch.rand(n, 3, 1, 1, generator=rng)
        paper = 0.4 * torch.rand(n, 3, 1, 1, generator=rng)
        images = to_bytes(paper + (ink - paper) * strokes)
        labels = torch.from_numpy(bunch.target).long()
        everything = ImageSet(images, labels, tuple("0123456789"))
        order = interleave(labels, 10, rng)
        cut = round(n * self.test_share)
        return everything.subset(order[cut:]), everything.subset(order[:cut])
