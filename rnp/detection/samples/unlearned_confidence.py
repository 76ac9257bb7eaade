"""A triggered image keeps its prediction when the model is unlearned, a clean image does not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector
from rnp.training.predict import predict
from rnp.types import Bytes, ImageSet


@dataclass(frozen=True, kw_only=True)
class UnlearnedConfidence(SampleDetector):
    """The confidence of the unlearned model in the original model's prediction.

    After the collapse clean images of the backdoor's label score as high as triggered ones, and
    later all images do: use the checkpoint at an accuracy of 0.2 to 0.5.

    Drawn at random: nothing.

    Source: Li et al., ICML 2023, for the idea; the paper's exact score was not available, this one
    is ours.
    """

    needs_unlearned = True

    def score(
        self,
        model: nn.Module,
        images: Bytes,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        unlearned: nn.Module | None = None,
    ) -> Float[Tensor, "n"]:
        unlearned = self.require_unlearned(unlearned)
        predicted = predict(model, images).argmax(1, keepdim=True)
        return predict(unlearned, images).softmax(1).gather(1, predicted).squeeze(1)
