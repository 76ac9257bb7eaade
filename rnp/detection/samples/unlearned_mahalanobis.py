"""The unlearned model's output for triggered images is far from that for clean ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector
from rnp.detection.samples.mahalanobis import distances
from rnp.training.predict import predict
from rnp.types import Bytes, ImageSet


@dataclass(frozen=True, kw_only=True)
class UnlearnedMahalanobis(SampleDetector):
    """Squared Mahalanobis distance of log probabilities from clean images of the predicted class.

    The log probabilities are those of the unlearned model, averaged over the checkpoints of the
    unlearning; the class is predicted by the original model.

    `unlearned_confidence` expects that the backdoor survives the unlearning. Where it is lost
    first, triggered images lose their prediction faster than clean ones. This detector finds them
    in both cases, and does not mistake clean images of the target class for triggered ones, since
    it compares within the class.

    Drawn at random: nothing.

    Source: Li et al., ICML 2023, for the use of the unlearned model; Lee et al., NeurIPS 2018,
    section 2.1, for the distance.
    """

    needs_unlearned = True
    needs_ensemble = True

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
        return distances(
            predict(unlearned, images).log_softmax(1),
            predict(model, images).argmax(1),
            predict(unlearned, clean.images).log_softmax(1),
            predict(model, clean.images).argmax(1),
        )
