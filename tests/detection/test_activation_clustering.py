from __future__ import annotations

import pytest
import torch
from planted import TARGET, PlantedFeatures, images, rng, triggered

from rnp.detection.samples.activation_clustering import ActivationClustering
from rnp.errors import UserError
from rnp.types import ImageSet


def score(images: torch.Tensor, clean: ImageSet) -> torch.Tensor:
    return ActivationClustering().score(PlantedFeatures(), images, clean, rng=rng())


# The triggered images are the minority of the 13 of their class, or the majority of the 70.
@pytest.mark.parametrize("n", [3, 60])
def test_a_cluster_without_clean_images_scores_one(n: int) -> None:
    test = images(seed=1)
    scores = score(torch.cat([test.images, triggered(test)[:n]]), images())
    assert scores[60:].tolist() == [1.0] * n
    share = 10 / (10 + n)  # of the cluster that has all clean images of the class
    expected = [(share - 1) / (share + 1)] * 10
    assert scores[:60][test.labels == TARGET].tolist() == pytest.approx(expected)
    assert scores[:60].max() < 1


def test_clusters_as_large_as_among_clean_images_score_zero() -> None:
    clean = images()
    assert score(clean.images, clean).abs().max() == 0


def test_images_that_cannot_be_split_score_zero() -> None:
    clean = images()
    same = clean.images[:1].expand(5, -1, -1, -1)
    other_classes = clean.subset((clean.labels != clean.labels[0]).nonzero().squeeze(1))
    assert score(same, other_classes).tolist() == [0.0] * 5


def test_out_of_range_fields_are_named() -> None:
    with pytest.raises(UserError, match=r"components.*0"):
        ActivationClustering(components=0)
