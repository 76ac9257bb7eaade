"""Activation Clustering: the images of a class fall into two groups, and the defender's clean ones
lie in one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector, penultimate_features
from rnp.types import Bytes, ImageSet


@dataclass(frozen=True, kw_only=True)
class ActivationClustering(SampleDetector):
    """How much larger a group is among the scored images than among clean ones, in [-1, 1]; one
    score per group.

    This judges a set, as one filters a training set: scores depend on which images are scored
    together, and a class with few images says little. Drawn at random: the starts of the
    clustering.

    Source: Chen et al., SafeAI 2019, arXiv 1811.03728, with its 10 components and its comparison
    of sizes.
    Differs: PCA instead of ICA, which need not converge. Classes are those predicted, not those of
    the training set. Clean images are clustered along and sizes compared with theirs, since the
    smaller group is the clean one where most images of a class are triggered: with 10 % of
    CIFAR-10 poisoned they are more than half.
    """

    components: Annotated[
        int, Ge(1), "principal components of the features in which images are clustered"
    ] = 10

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
        (seen, predicted), (known, known_predicted) = (
            penultimate_features(model, images),
            penultimate_features(model, clean.images),
        )
        scores = torch.zeros(len(images))
        for label in predicted.unique():
            here = predicted == label
            scores[here] = self._excess(seen[here], known[known_predicted == label], seed)
        return scores

    def _excess(
        self, seen: Float[Tensor, "n d"], known: Float[Tensor, "m d"], seed: int
    ) -> Float[Tensor, "n"]:
        from sklearn.cluster import KMeans
        from sklearn.decomposition import PCA

        both = torch.cat([seen, known])
        if len(both.unique(dim=0)) < 2:
            return torch.zeros(len(seen))
        points = PCA(min(self.components, *both.shape), svd_solver="full").fit_transform(
            both.numpy()
        )
        groups = torch.from_numpy(
            KMeans(2, n_init=10, random_state=seed).fit_predict(points)
        ).long()
        among_seen, among_known = (
            torch.bincount(part, minlength=2) / max(len(part), 1)  # [2], shares of each group
            for part in (groups[: len(seen)], groups[len(seen) :])
        )
        return ((among_seen - among_known) / (among_seen + among_known))[groups[: len(seen)]]
