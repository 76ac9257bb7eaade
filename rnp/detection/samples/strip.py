"""STRIP: the prediction of a triggered image stays when other images are blended into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector
from rnp.training.device import chosen_precision
from rnp.training.predict import eval_batches, predict
from rnp.types import Bytes, Images, ImageSet, Logits, to_floats

EPS = 1e-12


@dataclass(frozen=True, kw_only=True)
class Strip(SampleDetector):
    """Minus the mean entropy, in bits, of the predictions for blends with clean images.

    A blend is half of each image. Each image is scored by itself.

    Drawn at random: the clean images, the same for all scored ones.

    Source: Gao et al., ACSAC 2019, arXiv 1902.06531.
    Differs: the weights of a blend add up to 1, where public code adds images at full strength; a
    small constant in the logarithm prevents NaN for saturated predictions.
    """

    overlays: Annotated[int, Ge(1), "clean images that are blended into each scored image"] = 32

    def score(
        self,
        model: nn.Module,
        images: Bytes,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        unlearned: nn.Module | None = None,
    ) -> Float[Tensor, "n"]:
        positions = torch.randint(len(clean), (self.overlays,), generator=rng)
        overlays = to_floats(clean.images[positions])  # [m, c, h, w]
        entropies = [
            self._entropies(model, to_floats(part), overlays).mean(0)
            for part in eval_batches(images)
        ]
        return -torch.cat(entropies)

    def _entropies(
        self, model: nn.Module, images: Images, overlays: Float[Tensor, "m c h w"]
    ) -> Float[Tensor, "m n"]:
        blends = (images.lerp(overlay, 0.5) for overlay in overlays)
        return torch.stack(
            [entropy(predict(model, part, precision=chosen_precision())) for part in blends]
        )


def entropy(logits: Logits) -> Float[Tensor, "n"]:
    """The entropy of each row's prediction, in bits."""
    probabilities = logits.softmax(1)
    return -(probabilities * (probabilities + EPS).log2()).sum(1)
