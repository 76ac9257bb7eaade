"""Activation Clustering: the triggered images of a class form a cluster without clean ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float, Int64
from torch import Tensor, nn

from rnp.detection.base import SampleDetector, penultimate_features
from rnp.types import Bytes, ImageSet


@dataclass(frozen=True, kw_only=True)
class ActivationClustering(SampleDetector):
    """How much more of the scored images than of clean ones are in the image's cluster.

    The score is in [-1, 1] and equal within a cluster. It is made for filtering a training set: it
    depends on which images are scored together, and means little for a class with few images.

    Drawn at random: the starts of the clustering.

    Source: Chen et al., SafeAI 2019, arXiv 1811.03728, with its 10 components and its comparison
    of sizes.
    Differs: PCA instead of ICA, which need not converge. Classes are those predicted, not those of
    the training set. Clean images are clustered with the others, and the sizes compared with
    theirs: where most images of a class are triggered, as with 10 % of CIFAR-10 poisoned, the
    smaller cluster is the clean one.
    """

    components: Annotated[int, Ge(1), "principal components of the features for the clustering"] = (
        10
    )

    def score(
        self,
        model: nn.Module,
        images: Bytes,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        unlearned: nn.Module | None = None,
    ) -> Float[Tensor, "n"]:
        seed = int(torch.randint(2**31, (), generator=rng))
        features, predicted = penultimate_features(model, images)
        clean_features, clean_predicted = penultimate_features(model, clean.images)
        scores = torch.zeros(len(images))
        for label in predicted.unique():
            in_class = predicted == label
            reference = clean_features[clean_predicted == label]
            scores[in_class] = self._excess(features[in_class], reference, seed)
        return scores

    def _excess(
        self, features: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], seed: int
    ) -> Float[Tensor, "n"]:
        """The score of the images of one class, compared with the clean images of that class."""
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA

        both = torch.cat([features, reference])
        if len(both.unique(dim=0)) < 2:
            return torch.zeros(len(features))
        pca = PCA(min(self.components, *both.shape), svd_solver="full")
        points = pca.fit_transform(both.numpy())
        # sklearn annotates n_init by its default "auto" only.
        clustering = KMeans(2, n_init=10, random_state=seed)  # pyright: ignore[reportArgumentType]
        clusters = torch.from_numpy(clustering.fit_predict(points)).long()
        own_clusters = clusters[: len(features)]
        share = cluster_shares(own_clusters)
        clean_share = cluster_shares(clusters[len(features) :])
        return ((share - clean_share) / (share + clean_share))[own_clusters]


def cluster_shares(clusters: Int64[Tensor, "_"]) -> Float[Tensor, "2"]:
    """The share of the images in each of the two clusters."""
    return torch.bincount(clusters, minlength=2) / max(len(clusters), 1)
