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
    g = rng()
    labels = torch.arange(20_000) % 2
    centers = torch.tensor([[0.0, 0.0], [10.0, -4.0]])
    known = centers[labels] + torch.randn(len(labels), 2, generator=g) * torch.tensor([2.0, 1.0])
    seen = torch.tensor([[4.0, 0.0], [0.0, 3.0], [10.0, -4.0], [12.0, -5.0]])
    found = distances(seen, torch.tensor([0, 0, 1, 1]), known, labels)
    assert found.tolist() == pytest.approx([4, 9, 0, 2], abs=0.3)


def test_a_class_without_known_images_is_held_against_all_of_them() -> None:
    known = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    found = distances(torch.zeros(1, 2), torch.tensor([3]), known, torch.zeros(4, dtype=torch.long))
    assert found.tolist() == pytest.approx([0.0], abs=1e-6)


@pytest.mark.parametrize(
    "detector, model, unlearned",
    [
        (Mahalanobis(), PlantedFeatures(), None),
        (
            UnlearnedMahalanobis(),
            Planted(),
            Planted(bias=4.0),
        ),  # clean images drift to the target, triggered ones stay
        (
            UnlearnedMahalanobis(),
            Planted(),
            Planted(corner=-40.0),
        ),  # the trigger is what drives images away
    ],
    ids=["features", "outlives", "goes_first"],
)
def test_triggered_images_lie_off_the_clean_ones_of_their_class(detector, model, unlearned) -> None:
    clean, good, bad = images(120), images(seed=1), triggered(images(seed=2))

    def score(tested):
        return detector.score(model, tested, clean, rng=rng(), unlearned=unlearned)

    limit = threshold(score(images(120, seed=3).images))
    assert roc_auc_score([0] * 60 + [1] * 60, torch.cat([score(good.images), score(bad)])) > 0.95
    assert (score(bad) > limit).float().mean() > 0.9
    assert (score(good.images)[good.labels == TARGET] > limit).float().mean() < 0.3


def test_each_image_is_judged_by_itself() -> None:
    clean, tested = images(), torch.cat([images(seed=1).images, triggered(images(seed=1))])
    together = Mahalanobis().score(PlantedFeatures(), tested, clean, rng=rng())
    assert torch.allclose(
        together[3:4],
        Mahalanobis().score(PlantedFeatures(), tested[3:4], clean, rng=rng()),
        rtol=1e-4,
    )


def test_it_asks_for_the_unlearned_model() -> None:
    with pytest.raises(UserError, match="run unlearn"):
        UnlearnedMahalanobis().score(Planted(), images().images, images(), rng=rng())
