"""scikit-learn's handwritten digits, enlarged and colored: 1,797 images that need no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval

from rnp.data.base import Dataset, interleave
from rnp.types import ImageSet, to_bytes


@dataclass(frozen=True, kw_only=True)
class Digits(Dataset):
    """Ten digits of 8 by 8 pixels, enlarged, each in a random color on a random darker one.

    Drawn at random: the colors, and which images form the test set.
    Source: Alpaydin and Kaynak, 1998, UCI optical recognition of handwritten digits, test part, as
    in scikit-learn.
    """

    size: Annotated[int, Ge(8), "side of an image, in pixels"] = 32
    test_share: Annotated[
        float, Interval(gt=0, lt=1), "share of the images that form the test set"
    ] = 0.3

    def load(self, root: Path, *, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        from sklearn.datasets import load_digits

        digits, targets = load_digits(return_X_y=True)  # [n, 64], from 0 to 16
        strokes = torch.from_numpy(digits).float().div(16).view(-1, 1, 8, 8)
        strokes = F.interpolate(strokes, size=self.size, mode="bicubic", align_corners=False)
        strokes = strokes.clamp(0, 1)
        n = len(strokes)
        ink = 0.5 + 0.5 * torch.rand(n, 3, 1, 1, generator=rng)
        paper = 0.4 * torch.rand(n, 3, 1, 1, generator=rng)
        images = to_bytes(paper + (ink - paper) * strokes)
        labels = torch.from_numpy(targets).long()
        everything = ImageSet(images, labels, tuple("0123456789"))
        order = interleave(labels, 10, rng)
        cut = round(n * self.test_share)
        return everything.subset(order[cut:]), everything.subset(order[:cut])
