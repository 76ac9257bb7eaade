"""The confidence in a prediction falls less for triggered images than for clean ones when the
model is unlearned.
"""

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
    """Log confidence of the unlearned model in what the original predicts, minus that of the
    original; in nats.

    `unlearned_confidence` asks what is left, this asks which share of it. Clean images of which the original
    was not sure have little to lose and score high. The caveat on the checkpoint is that of
    `unlearned_confidence`.

    Source: Li et al., ICML 2023, for the idea; the paper's exact score could not be read, this one
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
    return (
        predict(changed, images).log_softmax(1).gather(1, predicted.unsqueeze(1)).squeeze(1)
        - before
    )
