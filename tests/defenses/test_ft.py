"""Fine-tuning: as many steps as requested, on half a cosine."""

import math

import pytest

from rnp.defenses.ft import FT
from rnp.errors import UserError
from rnp.training.augment import Augment
from rnp.training.predict import accuracy
from rnp.types import DefenseSet


def test_the_step_size_falls_on_half_a_cosine(trained, toy_set, rng):
    """40 images in batches of 10: four steps each epoch, ten steps end in the third."""
    rows = []
    defense_set = DefenseSet(toy_set(40), toy_set(4))
    method = FT(lr=0.1, steps=10, batch_size=10)
    method.repair(trained, defense_set, rng=rng(), on_epoch=rows.append)
    assert [row.step for row in rows] == [4, 8, 10]
    assert [row.learning_rate for row in rows] == pytest.approx(
        [0.05 * (1 + math.cos(math.pi * i / 10)) for i in (3, 7, 9)]
    )


def test_it_learns_from_the_defense_set(toy_model, toy_set, rng):
    model, test = toy_model(), toy_set(80, seed=9)
    method = FT(lr=0.1, steps=100, batch_size=8, augment=Augment(crop=0))
    repaired = method.repair(model, DefenseSet(toy_set(80), toy_set(4)), rng=rng()).model
    assert accuracy(model, test) < 0.5
    assert accuracy(repaired, test) > 0.9


@pytest.mark.parametrize("name", ["lr", "batch_size", "steps"])
def test_impossible_settings_are_refused(name):
    with pytest.raises(UserError, match=rf"ft\.{name} must be above 0, got 0"):
        FT(**{name: 0})
