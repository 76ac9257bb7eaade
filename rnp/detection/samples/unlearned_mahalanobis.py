"""The unlearned model answers a triggered image unlike any clean one, too surely or in another
way.
"""

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
    """Squared Mahalanobis distance of the unlearned model's log probabilities from those of clean
    images that the given model takes for the same class; the probabilities are means over the
    checkpoints of the unlearning.

    `unlearned_confidence` expects that the backdoor outlives the unlearning. Where it goes first, triggered
    images lose their prediction faster than clean ones; this finds them in both cases, and does
    not mistake the clean images of the target class for triggered ones, since it compares within
    the class. Nothing is random.

    Source: Li et al., ICML 2023, for the idea of asking the unlearned model; Lee et al., NeurIPS
    2018, section 2.1, for the distance.
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
        (seen, predicted), (known, known_predicted) = (
            (predict(unlearned, each).log_softmax(1), predict(model, each).argmax(1))
            for each in (images, clean.images)
        )
        return distances(seen, predicted, known, known_predicted)
