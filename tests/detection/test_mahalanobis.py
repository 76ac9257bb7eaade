from __future__ import annotations

import pytest
import torch
from planted import TARGET, Planted, PlantedFeatures, images, rng, triggered
from sklearn.metrics import roc_auc_score

from rnp.detection.base import threshold
from rnp.detection.samples.mahalanobis import Mahalanobis, distances
from rnp.detection.samples.unlearned_mahalanobis import UnlearnedMahalanobis
from rnp.errors import UserError


def test_distances_along_and_across_a_known_spread() -> None:
    labels = torch.arange(20_000) % 2
    centers = torch.tensor([[0.0, 0.0], [10.0, -4.0]])
    noise = torch.randn(len(labels), 2, generator=rng()) * torch.tensor([2.0, 1.0])
    clean_features = centers[labels] + noise
    features = torch.tensor([[4.0, 0.0], [0.0, 3.0], [10.0, -4.0], [12.0, -5.0]])
    result = distances(features, torch.tensor([0, 0, 1, 1]), clean_features, labels)
    assert result.tolist() == pytest.approx([4, 9, 0, 2], abs=0.3)


def test_a_class_without_clean_images_is_compared_with_all_of_them() -> None:
    clean_features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    clean_labels = torch.zeros(4, dtype=torch.long)
    result = distances(torch.zeros(1, 2), torch.tensor([3]), clean_features, clean_labels)
    assert result.tolist() == pytest.approx([0.0], abs=1e-6)


@pytest.mark.parametrize(
    "detector, model, unlearned",
    [
        (Mahalanobis(), PlantedFeatures(), None),
        # Clean images drift to the target, triggered ones stay.
        (UnlearnedMahalanobis(), Planted(), Planted(bias=4.0)),
        # Only the images with a trigger change.
        (UnlearnedMahalanobis(), Planted(), Planted(corner=-40.0)),
    ],
    ids=["features", "backdoor survives", "backdoor is lost first"],
)
def test_triggered_images_are_far_from_clean_ones_of_their_class(
    detector, model, unlearned
) -> None:
    test = images(seed=1)

    def score(candidates):
        return detector.score(model, candidates, images(120), rng=rng(), unlearned=unlearned)

    limit = threshold(score(images(120, seed=3).images))
    clean_scores = score(test.images)
    scores = score(triggered(images(seed=2)))
    assert roc_auc_score([0] * 60 + [1] * 60, torch.cat([clean_scores, scores])) > 0.95
    assert (scores > limit).float().mean() > 0.9
    assert (clean_scores[test.labels == TARGET] > limit).float().mean() < 0.3


def test_each_image_is_scored_by_itself() -> None:
    candidates = torch.cat([images(seed=1).images, triggered(images(seed=1))])
    together, alone = (
        Mahalanobis().score(PlantedFeatures(), part, images(), rng=rng())
        for part in (candidates, candidates[3:4])
    )
    assert torch.allclose(together[3:4], alone, rtol=1e-4)


def test_the_unlearned_model_is_required() -> None:
    with pytest.raises(UserError, match="run unlearn"):
        UnlearnedMahalanobis().score(Planted(), images().images, images(), rng=rng())
