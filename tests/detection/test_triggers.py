from __future__ import annotations

import pytest
from planted import CORNER, TARGET, Planted, images, rng

from rnp.detection.base import iou, iou_top_k
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.training.predict import predict


def test_the_planted_corner_is_recovered() -> None:
    triggers = NeuralCleanse().recover(Planted(), images(), rng=rng())
    trigger = triggers[TARGET]
    assert [t.label for t in triggers] == list(range(len(triggers)))
    assert iou(trigger.mask, CORNER) == iou_top_k(trigger.mask, CORNER) == 1.0
    assert trigger.pattern[:, CORNER].min() > 0.9
    assert trigger.l1 < 0.5 * min(t.l1 for t in triggers if t is not trigger)
    assert all(t.success > 0.8 and t.baseline == 0 for t in triggers)
    logits = predict(Planted(), trigger.apply(images(seed=1).as_floats()))
    assert (logits.argmax(1) == TARGET).float().mean() > 0.95


def test_in_an_unlearned_model_the_trigger_adds_to_the_baseline() -> None:
    trigger = NeuralCleanse().recover(Planted(bias=6.0), images(), rng=rng())[TARGET]
    assert 0.3 < trigger.baseline < 0.9
    assert trigger.gain > 0.9
    assert iou_top_k(trigger.mask, CORNER) == 1.0


def test_in_a_collapsed_model_there_is_nothing_to_recover() -> None:
    trigger = NeuralCleanse(steps=50).recover(Planted(bias=50.0), images(), rng=rng())[TARGET]
    assert trigger.success == trigger.baseline == 1.0
    assert trigger.gain == 0.0


def test_some_labels_alone() -> None:
    method = NeuralCleanse(steps=2)
    triggers = method.recover_for([4, 1], Planted(), images(), rng=rng())
    assert [trigger.label for trigger in triggers] == [4, 1]


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
