"""When the model is unlearned, confidence drops less for triggered images than for clean ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector
from rnp.training.predict import predict
from rnp.types import Bytes, ImageSet


@dataclass(frozen=True, kw_only=True)
class UnlearnedRatio(SampleDetector):
    """Log ratio of the unlearned model's confidence in a prediction to the original model's.

    In nats; the prediction is the original model's. `unlearned_confidence` measures the confidence
    that remains, this one its share of the former confidence. Clean images with a low former
    confidence score high. The choice of the checkpoint matters as for `unlearned_confidence`.

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
        return log_ratio(self.require_unlearned(unlearned), model, images)


def log_ratio(changed: nn.Module, model: nn.Module, images: Bytes) -> Float[Tensor, "n"]:
    """Log confidence of `changed` in the predictions of `model`, minus that of `model`."""
    before, predicted = predict(model, images).log_softmax(1).max(1)
    after = predict(changed, images).log_softmax(1).gather(1, predicted.unsqueeze(1)).squeeze(1)
    return after - before
