"""Triggered images reach their class by another way than clean ones: their features lie off the
clean images of that class.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rnp.detection.base import SampleDetector, penultimate_features
from rnp.types import Bytes, ImageSet, Labels


@dataclass(frozen=True, kw_only=True)
class Mahalanobis(SampleDetector):
    """Squared Mahalanobis distance of an image's features from those of the clean images that are
    taken for the same class.

    Each image is judged by itself, whatever is scored beside it. Nothing is random.

    Source: Lee et al., NeurIPS 2018, arXiv 1807.03888, section 2.1, for images from elsewhere;
    here triggered ones are those.
    Differs: the penultimate layer alone and no noise on the input. The classes are those
    predicted. The covariance, which all classes share, is shrunk (Ledoit and Wolf, 2004), since
    the defender has fewer images than such a layer has features.
    """

    def score(
        self,
        model: nn.Module,
        images: Bytes,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        unlearned: nn.Module | None = None,
    ) -> Float[Tensor, "n"]:
        return distances(
            *penultimate_features(model, images), *penultimate_features(model, clean.images)
        )


def distances(
    seen: Float[Tensor, "n d"],
    predicted: Labels,
    known: Float[Tensor, "m d"],
    known_predicted: Int64[Tensor, "m"],
) -> Float[Tensor, "n"]:
    """Squared Mahalanobis distances of `seen` from the mean of those of `known` that are predicted
    alike.

    Where there are none the mean of all of `known` stands in.
    """
    from sklearn.covariance import LedoitWolf

    means = known.mean(0).repeat(int(torch.cat([predicted, known_predicted]).max()) + 1, 1)
    for label in known_predicted.unique():
        means[label] = known[known_predicted == label].mean(0)
    spread = LedoitWolf(assume_centered=True).fit((known - means[known_predicted]).double().numpy())
    return torch.from_numpy(spread.mahalanobis((seen - means[predicted]).double().numpy())).float()
