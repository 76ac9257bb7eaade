"""STRIP: the prediction of a triggered image survives when other images shine through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector
from rnp.errors import UserError
from rnp.training import EVAL_BATCH, Precision, predict
from rnp.types import Bytes, ImageSet, to_floats

EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class Strip(SampleDetector):
    """Minus the mean entropy, in bits, of the predictions for half-and-half blends with clean images.

    Drawn at random: the clean images, the same ones for all scored images, so that a score does not depend on its neighbours.

    Source: Gao et al., ACSAC 2019, section 4.
    Differs: the weights of a blend add up to 1, while public code adds images at full strength; a small constant inside the logarithm
    keeps saturated predictions from becoming NaN.
    """

    overlays: Annotated[int, "clean images that are blended into each scored image"] = 32
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = "auto"

    def __post_init__(self) -> None:
        if self.overlays < 1:
            raise UserError(f"overlays must be at least 1, got {self.overlays}")

    def score(self, model: nn.Module, images: Bytes, clean: ImageSet, *, rng: torch.Generator,
              unlearned: nn.Module | None = None) -> Float[Tensor, "n"]:
        drawn = torch.randint(len(clean), (self.overlays,), generator=rng)
        overlays = to_floats(clean.images[drawn])  # [m, c, h, w]
        scores = [-sum(self._entropy(model, to_floats(part).lerp(overlay, 0.5)) for overlay in overlays) / self.overlays
                  for part in images.split(EVAL_BATCH)]
        return torch.cat(scores)

    def _entropy(self, model: nn.Module, blended: Tensor) -> Float[Tensor, "n"]:
        probabilities = predict(model, blended, precision=self.precision).softmax(1)
        return -(probabilities * (probabilities + EPS).log2()).sum(1)
