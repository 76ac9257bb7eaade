"""Spectral Signatures: the features of triggered images stand out along the direction in which
their class varies most.
"""

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

    This judges a set, as one filters a training set: scores depend on which images are scored
    together, through that direction. Nothing is random.

    Source: Tran et al., NeurIPS 2018, arXiv 1811.00636, Algorithm 1.
    Differs: classes are those predicted, not those of the training set. Features are centerd on
    the defender's clean images of the class, not on those scored: the own mean lies among the
    triggered images where these are the majority, and clean ones then stand out. A class that no
    clean image is taken for is centerd on its own mean.
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
        (seen, predicted), (known, known_predicted) = (
            penultimate_features(model, images),
            penultimate_features(model, clean.images),
        )
        scores = torch.zeros(len(images))
        for label in predicted.unique():
            here = predicted == label
            scores[here] = projections(seen[here], known[known_predicted == label])
        return scores


def projections(seen: Float[Tensor, "n d"], known: Float[Tensor, "m d"]) -> Float[Tensor, "n"]:
    """Squared, on the direction of the largest second moment of `seen` around the mean of
    `known`.
    """
    centerd = seen - (known if len(known) else seen).mean(0)
    first = torch.linalg.eigh(centerd.T @ centerd).eigenvectors[:, -1]
    return (centerd @ first).square()
