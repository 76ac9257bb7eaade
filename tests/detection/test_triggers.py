from __future__ import annotations

import pytest
from planted import CORNER, TARGET, Planted, images, rng

from rnp.detection.base import iou, iou_top_k
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.training.predict import predict


def test_the_planted_corner_is_found() -> None:
    clean, model = images(), Planted()
    triggers = NeuralCleanse().recover(model, clean, rng=rng())
    found = triggers[TARGET]
    assert [t.label for t in triggers] == list(range(len(triggers)))
    assert iou(found.mask, CORNER) == iou_top_k(found.mask, CORNER) == 1.0
    assert found.pattern[:, CORNER].min() > 0.9
    assert found.l1 < 0.5 * min(t.l1 for t in triggers if t is not found)
    assert all(t.success > 0.8 and t.baseline == 0 for t in triggers)
    test = images(seed=1)
    assert (predict(model, found.apply(test.as_floats())).argmax(1) == TARGET).float().mean() > 0.95


def test_on_an_unlearned_model_the_mask_does_what_the_baseline_does_not() -> None:
    found = NeuralCleanse().recover(Planted(bias=6.0), images(), rng=rng())[TARGET]
    assert 0.3 < found.baseline < 0.9
    assert found.gain > 0.9
    assert iou_top_k(found.mask, CORNER) == 1.0


def test_a_collapsed_model_leaves_nothing_to_recover() -> None:
    found = NeuralCleanse(steps=50).recover(Planted(bias=50.0), images(), rng=rng())[TARGET]
    assert found.success == found.baseline == 1.0 and found.gain == 0.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("steps", 0),
        ("batch_size", 0),
        ("lr", 0.0),
        ("init_cost", -1.0),
        ("patience", 0),
        ("success", 0.0),
        ("success", 99.0),
        ("multiplier", 1.0),
    ],
)
def test_out_of_range_fields_are_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}.*{value:g}"):
        NeuralCleanse(**{field: value})
