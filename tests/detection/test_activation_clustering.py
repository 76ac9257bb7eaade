from __future__ import annotations

import pytest
import torch
from planted import TARGET, PlantedFeatures, images, rng, triggered

from rnp.detection.samples.activation_clustering import ActivationClustering
from rnp.errors import UserError


@pytest.mark.parametrize(
    "n", [3, 60]
)  # of 13 images of the target class, and of 70: the minority and the majority
def test_a_group_without_clean_images_scores_one(n: int) -> None:
    clean, test = images(), images(seed=1)
    tested = torch.cat([test.images, triggered(test)[:n]])
    scores = ActivationClustering().score(PlantedFeatures(), tested, clean, rng=rng())
    assert scores[60:].tolist() == [1.0] * n
    share = 10 / (10 + n)  # of the group in which all clean images of the class lie
    assert scores[:60][test.labels == TARGET].tolist() == pytest.approx(
        [(share - 1) / (share + 1)] * 10
    )
    assert scores[:60].max() < 1


def test_groups_as_large_as_among_clean_images_score_zero() -> None:
    clean = images()
    assert (
        ActivationClustering().score(PlantedFeatures(), clean.images, clean, rng=rng()).abs().max()
        == 0
    )


def test_images_that_cannot_be_split_score_zero() -> None:
    clean = images()
    same = clean.images[:1].expand(5, -1, -1, -1)
    none_known = clean.subset((clean.labels != clean.labels[0]).nonzero().squeeze(1))
    assert (
        ActivationClustering().score(PlantedFeatures(), same, none_known, rng=rng()).tolist()
        == [0.0] * 5
    )


def test_out_of_range_fields_are_named() -> None:
    with pytest.raises(UserError, match=r"components.*0"):
        ActivationClustering(components=0)
