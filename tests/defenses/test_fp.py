"""Fine-pruning: which features go, how many, and that they stay gone."""

import copy

import pytest
import torch

from rnp.defenses.fp import FP
from rnp.defenses.ft import FT
from rnp.errors import UserError
from rnp.models.features import features
from rnp.training.augment import Augment
from rnp.training.predict import accuracy
from rnp.types import DefenseSet


@pytest.fixture
def defense_set(toy_set):
    return DefenseSet(toy_set(40, seed=3), toy_set(40, seed=4))


def gone(model) -> set[int]:
    """The features that the classifier does not read."""
    return {k for k in range(model.fc.in_features) if not model.fc.weight[:, k].any()}


def test_a_sleeping_feature_goes_and_stays_gone(trained, defense_set, rng, unchanged):
    with torch.no_grad():
        trained.bn2.bias[5] -= 99  # no clean image excites it
        trained.fc.weight[0, 5] = 50
    repaired = FP(max_accuracy_drop=0.0, max_fraction=0.2, steps=30, lr=0.1).repair(
        unchanged(trained), defense_set, rng=rng()
    )
    assert (
        gone(repaired.model) == {5}
        and repaired.chosen.pruned == 1
        and repaired.chosen.threshold == 0
    )
    assert not torch.equal(repaired.model.fc.weight[:, 4], trained.fc.weight[:, 4]), (
        "the rest was tuned"
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.04, 0.3])
def test_the_least_active_go_until_accuracy_falls(epsilon, trained, defense_set, rng):
    data, trial, expected = defense_set.all, copy.deepcopy(trained), set()
    least = features(trained, data.as_floats())[0].mean(0).argsort().tolist()
    for k in least:
        trial.fc.weight.data[:, k] = 0
        if accuracy(trained, data) - accuracy(trial, data) > epsilon + 1e-6:
            break
        expected.add(k)
    repaired = FP(max_accuracy_drop=epsilon, max_fraction=0.99, steps=1).repair(
        trained, defense_set, rng=rng()
    )
    assert gone(repaired.model) == expected and repaired.chosen.pruned == len(expected) < 8
    assert repaired.chosen.lost <= epsilon + 1e-6


@pytest.mark.parametrize("fraction, most", [(0.0, 0), (0.3, 2), (0.5, 4)])
def test_no_more_than_the_largest_share(fraction, most, trained, defense_set, rng):
    assert (
        len(
            gone(
                FP(max_accuracy_drop=0.99, max_fraction=fraction, steps=1)
                .repair(trained, defense_set, rng=rng())
                .model
            )
        )
        == most
    )


def test_without_pruning_it_is_fine_tuning(trained, defense_set, rng):
    options = dict(steps=7, batch_size=16, lr=0.05, augment=Augment(crop=1))
    rows = [], []
    one = (
        FP(max_fraction=0.0, **options)
        .repair(trained, defense_set, rng=rng(), on_epoch=rows[0].append)
        .model.state_dict()
    )
    same = (
        FT(**options)
        .repair(trained, defense_set, rng=rng(), on_epoch=rows[1].append)
        .model.state_dict()
    )
    assert all(torch.equal(one[name], same[name]) for name in one) and rows[0] == rows[1]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("epsilon", 4, r"fp\.epsilon must be in \[0, 1\), got 4; it is a fraction, not percent"),
        ("max_fraction", 60, r"fp\.max_fraction must be in \[0, 1\), got 60"),
        ("epsilon", -0.1, "epsilon"),
        *(
            (name, 0, rf"fp\.{name} must be above 0, got 0")
            for name in ("lr", "batch_size", "steps")
        ),
    ],
)
def test_impossible_settings_are_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        FP(**{name: value})
