from __future__ import annotations

import pytest
import torch
from planted import TARGET, PlantedFeatures, images, rng, triggered

from rnp.detection.samples.spectral_signatures import SpectralSignatures, projections


def test_projections_of_features_on_a_line() -> None:
    features = torch.tensor([[1.0, 1.0], [1.0, 1.0], [4.0, 5.0]])
    reference = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    assert projections(features, reference).tolist() == pytest.approx([0, 0, 25], abs=1e-4)
    # Without a reference: the own mean is (2, 7/3), 5/3 from the pair and 10/3 from the third.
    centered = projections(features, torch.zeros(0, 2))
    assert centered.tolist() == pytest.approx([25 / 9, 25 / 9, 100 / 9], abs=1e-4)


def test_only_the_first_direction_counts() -> None:
    features = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 2.0]])
    assert projections(features, torch.zeros(1, 2)).tolist() == pytest.approx([9, 9, 0], abs=1e-4)


@pytest.mark.parametrize("n", [3, 60])  # the minority and the majority of the target class
def test_triggered_images_are_outliers(n: int) -> None:
    test = images(seed=1)
    tested = torch.cat([test.images, triggered(test)[:n]])
    scores = SpectralSignatures().score(PlantedFeatures(), tested, images(), rng=rng())
    assert scores[60:].min() > 7 and scores[:60].max() < 1  # the corner's feature is 3


def test_classes_are_scored_separately() -> None:
    test = images(seed=1)
    others = test.labels != TARGET
    alone, mixed = (
        SpectralSignatures().score(PlantedFeatures(), part, images(), rng=rng())[:60][others]
        for part in (test.images, torch.cat([test.images, triggered(test)]))
    )
    assert mixed.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
