"""Spectral Signatures: triggered images are outliers in the main direction of their class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector, penultimate_features
from rnp.types import Bytes, ImageSet


@dataclass(frozen=True, kw_only=True)
class SpectralSignatures(SampleDetector):
    """Squared projection of an image's features on the first principal direction of its class.

    It is made for filtering a training set: through that direction a score depends on which images
    are scored together.

    Drawn at random: nothing.

    Source: Tran et al., NeurIPS 2018, arXiv 1811.00636, Algorithm 1.
    Differs: classes are those predicted, not those of the training set. Features are centered on
    the mean of the defender's clean images of the class, not on that of the scored ones: where
    most of these are triggered, the clean ones would be the outliers. A class without clean images
    is centered on its own mean.
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
        features, predicted = penultimate_features(model, images)
        clean_features, clean_predicted = penultimate_features(model, clean.images)
        scores = torch.zeros(len(images))
        for label in predicted.unique():
            in_class = predicted == label
            reference = clean_features[clean_predicted == label]
            scores[in_class] = projections(features[in_class], reference)
        return scores


def projections(
    features: Float[Tensor, "n d"], reference: Float[Tensor, "m d"]
) -> Float[Tensor, "n"]:
    """Squared projections on the direction of the largest second moment of the features.

    The moment is around the mean of `reference`, or of the features where that is empty.
    """
    centered = features - (reference if len(reference) else features).mean(0)
    direction = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -1]
    return (centered @ direction).square()
