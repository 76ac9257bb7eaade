"""The features of triggered images are far from those of the clean images of their class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rnp.detection.base import SampleDetector, penultimate_features
from rnp.types import Bytes, ImageSet, Labels


@dataclass(frozen=True, kw_only=True)
class Mahalanobis(SampleDetector):
    """Squared Mahalanobis distance of features from the clean images of the predicted class.

    Each image is scored by itself.

    Drawn at random: nothing.

    Source: Lee et al., NeurIPS 2018, arXiv 1807.03888, section 2.1, for images from another
    distribution; here those are the triggered ones.
    Differs: only the penultimate layer, and no noise on the input. The classes are those
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
    features: Float[Tensor, "n d"],
    predicted: Labels,
    clean_features: Float[Tensor, "m d"],
    clean_predicted: Int64[Tensor, "m"],
) -> Float[Tensor, "n"]:
    """Squared Mahalanobis distances from the mean of the clean images with the same prediction.

    Where there are none it is the mean of all clean images.
    """
    from sklearn.covariance import LedoitWolf

    num_classes = int(torch.cat([predicted, clean_predicted]).max()) + 1
    means = clean_features.mean(0).repeat(num_classes, 1)  # [k, d]
    for label in clean_predicted.unique():
        means[label] = clean_features[clean_predicted == label].mean(0)
    clean_residuals = (clean_features - means[clean_predicted]).double()
    residuals = (features - means[predicted]).double()
    covariance = LedoitWolf(assume_centered=True).fit(clean_residuals.numpy())
    return torch.from_numpy(covariance.mahalanobis(residuals.numpy())).float()
