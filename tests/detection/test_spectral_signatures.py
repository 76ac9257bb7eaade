from __future__ import annotations

import pytest
import torch
from planted import TARGET, PlantedFeatures, images, rng, triggered

from rnp.detection.samples.spectral_signatures import SpectralSignatures, projections


def test_projections_of_features_on_a_line() -> None:
    seen = torch.tensor([[1.0, 1.0], [1.0, 1.0], [4.0, 5.0]])
    assert projections(seen, torch.tensor([[0.0, 2.0], [2.0, 0.0]])).tolist() == pytest.approx(
        [0, 0, 25], abs=1e-4
    )
    own_mean = projections(
        seen, torch.zeros(0, 2)
    )  # (2, 7/3), 5/3 from the pair and 10/3 from the third
    assert own_mean.tolist() == pytest.approx([25 / 9, 25 / 9, 100 / 9], abs=1e-4)


def test_only_the_first_direction_counts() -> None:
    seen = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 2.0]])
    assert projections(seen, torch.zeros(1, 2)).tolist() == pytest.approx([9, 9, 0], abs=1e-4)


@pytest.mark.parametrize("n", [3, 60])  # the minority and the majority of the target class
def test_triggered_images_stand_out(n: int) -> None:
    clean, test = images(), images(seed=1)
    tested = torch.cat([test.images, triggered(test)[:n]])
    scores = SpectralSignatures().score(PlantedFeatures(), tested, clean, rng=rng())
    assert scores[60:].min() > 7 and scores[:60].max() < 1  # the corner's feature is 3


def test_classes_are_judged_apart() -> None:
    clean, test = images(), images(seed=1)
    detector, model = SpectralSignatures(), PlantedFeatures()
    others = test.labels != TARGET
    alone = detector.score(model, test.images, clean, rng=rng())[others]
    mixed = detector.score(model, torch.cat([test.images, triggered(test)]), clean, rng=rng())[:60][
        others
    ]
    assert mixed.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
