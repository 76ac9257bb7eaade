"""Fine-pruning: which features are pruned, how many, and that they stay pruned."""

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


def pruned_features(model) -> set[int]:
    """The features that the classifier ignores."""
    return {k for k in range(model.fc.in_features) if not model.fc.weight[:, k].any()}


def test_a_dormant_feature_is_pruned_and_stays_pruned(trained, defense_set, rng, unchanged):
    with torch.no_grad():
        trained.bn2.bias[5] -= 99  # no clean image activates it
        trained.fc.weight[0, 5] = 50
    method = FP(max_accuracy_drop=0.0, max_fraction=0.2, steps=30, lr=0.1)
    repaired = method.repair(unchanged(trained), defense_set, rng=rng())
    assert pruned_features(repaired.model) == {5}
    assert repaired.chosen.pruned == 1
    assert repaired.chosen.threshold == 0
    tuned, before = repaired.model.fc.weight[:, 4], trained.fc.weight[:, 4]
    assert not torch.equal(tuned, before), "the rest was tuned"


@pytest.mark.parametrize("drop", [0.0, 0.04, 0.3])
def test_the_least_active_are_pruned_until_accuracy_falls(drop, trained, defense_set, rng):
    data, trial, expected = defense_set.all, copy.deepcopy(trained), set()
    for k in features(trained, data.as_floats())[0].mean(0).argsort().tolist():
        trial.fc.weight.data[:, k] = 0
        if accuracy(trained, data) - accuracy(trial, data) > drop + 1e-6:
            break
        expected.add(k)
    method = FP(max_accuracy_drop=drop, max_fraction=0.99, steps=1)
    repaired = method.repair(trained, defense_set, rng=rng())
    assert pruned_features(repaired.model) == expected
    assert repaired.chosen.pruned == len(expected) < 8
    assert repaired.chosen.lost <= drop + 1e-6


@pytest.mark.parametrize("fraction, largest", [(0.0, 0), (0.3, 2), (0.5, 4)])
def test_no_more_than_the_largest_fraction(fraction, largest, trained, defense_set, rng):
    method = FP(max_accuracy_drop=0.99, max_fraction=fraction, steps=1)
    repaired = method.repair(trained, defense_set, rng=rng())
    assert len(pruned_features(repaired.model)) == largest


def test_without_pruning_it_is_fine_tuning(trained, defense_set, rng):
    options = {"steps": 7, "batch_size": 16, "lr": 0.05, "augment": Augment(crop=1)}
    states, histories = [], []
    for method in (FP(max_fraction=0.0, **options), FT(**options)):
        rows = []
        repaired = method.repair(trained, defense_set, rng=rng(), on_epoch=rows.append)
        states.append(repaired.model.state_dict())
        histories.append(rows)
    one, same = states
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert histories[0] == histories[1] != []


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "max_accuracy_drop",
            4,
            r"fp\.max_accuracy_drop must be in \[0, 1\), got 4; it is a fraction, not percent",
        ),
        ("max_accuracy_drop", -0.1, r"fp\.max_accuracy_drop must be in \[0, 1\), got -0\.1"),
        ("max_accuracy_drop", 1, r"fp\.max_accuracy_drop must be in \[0, 1\), got 1"),
        ("max_fraction", 60, r"fp\.max_fraction must be in \[0, 1\), got 60"),
        ("lr", 0, r"fp\.lr must be above 0, got 0"),
        ("batch_size", 0, r"fp\.batch_size must be above 0, got 0"),
        ("steps", 0, r"fp\.steps must be above 0, got 0"),
    ],
)
def test_impossible_settings_are_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        FP(**{name: value})
