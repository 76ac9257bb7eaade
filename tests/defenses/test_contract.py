"""What every defense keeps to: a new file in rnp/defenses is tested from its first day."""

import dataclasses

import pytest
import torch

from rnp import registry
from rnp.defenses.base import PruningDefense, suspicion_to_score
from rnp.defenses.rnp import RNP
from rnp.errors import UserError
from rnp.neurons.masks import maskable, prune, unit_mask
from rnp.prune import Prune
from rnp.training.predict import accuracy
from rnp.types import DefenseSet, ImageSet

# A new classifier needs its steps, and gets only eight features.
TOY = {"fst": {"steps": 200, "alpha": 0.02}}


@pytest.fixture(params=registry.names("defense"))
def defense(request):
    """The defaults, but short: no run of a toy needs hundreds of steps."""
    method = registry.load("defense", request.param)()
    short = {
        field.name: min(getattr(method, field.name), 20)
        for field in dataclasses.fields(method)
        if field.name in ("steps", "epochs", "rounds")
    }
    return dataclasses.replace(method, **(short | TOY.get(request.param, {})))


@pytest.fixture
def defense_set(toy_set):
    return DefenseSet(toy_set(40, seed=3), toy_set(40, seed=4))


def test_the_family_has_the_method_of_the_paper():
    assert {"rnp", "rnp_ft"} <= set(registry.names("defense"))


def test_the_model_and_the_images_are_left_alone(defense, trained, defense_set, unchanged, rng):
    images = defense_set.train.images.clone()
    global_state = torch.get_rng_state()
    repaired = defense.repair(unchanged(trained), defense_set, rng=rng()).model
    assert repaired is not trained and not repaired.training and not trained.training
    assert torch.equal(defense_set.train.images, images)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert repaired.state_dict().keys() == trained.state_dict().keys(), "the same architecture"


def test_the_generator_decides(defense, trained, defense_set, rng):
    """A generator of the same seed gives the same result, whether a defense moves it or draws from
    its children.
    """
    one, same = (
        defense.repair(trained, defense_set, rng=rng(1)).model.state_dict() for _ in range(2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_a_benign_model_stays_useful(defense, trained, defense_set, toy_set, rng):
    repaired = defense.repair(trained, defense_set, rng=rng()).model
    test = toy_set(80, seed=9)
    assert accuracy(repaired, test) > accuracy(trained, test) - 0.15


def test_a_defense_that_ends_in_pruning_shows_its_sweep(defense, trained, defense_set, rng):
    """RNP and the defenses that are a score; in all others a sweep would describe another model
    than the repaired one.
    """
    repaired = defense.repair(trained, defense_set, rng=rng())
    assert isinstance(defense, PruningDefense | RNP) == bool(repaired.sweep)
    assert repaired.chosen in repaired.sweep or not repaired.sweep


@pytest.mark.parametrize(
    "name, field",
    [
        (name, field)
        for name in registry.names("defense")
        for field in ("lr", "batch_size", "steps")
        if field in registry.load("defense", name).__dataclass_fields__
    ],
)
def test_a_field_that_a_subclass_changes_keeps_its_range(name, field):
    with pytest.raises(UserError, match=rf"{name}\.{field} must be above 0, got 0"):
        registry.load("defense", name)(**{field: 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstChannels(PruningDefense):
    """Suspects the channels of the first layer, in order."""

    def score(self, model, defense_set, *, rng, on_epoch=lambda _: None):
        mask = unit_mask(model)
        first = next(iter(maskable(model)))
        mask[first] = torch.arange(len(mask[first])) / 100
        return mask


def test_a_score_is_all_that_a_pruning_defense_needs(trained, defense_set, rng):
    method = FirstChannels(prune=Prune(rule="number", num_neurons=2))
    repaired = method.repair(trained, defense_set, rng=rng())
    expected = prune(trained, [("bn1", 0), ("bn1", 1)]).state_dict()
    for name, value in repaired.model.state_dict().items():
        assert torch.equal(value, expected[name])
    assert repaired.chosen.pruned == 2
    assert repaired.chosen.threshold == pytest.approx(0.01)


def test_the_sweep_is_measured_on_all_of_the_defense_set(trained, toy_set, rng):
    data = toy_set(40)
    mislabeled = ImageSet(data.images, data.labels.roll(1), data.classes)
    high, low = accuracy(trained, data), accuracy(trained, mislabeled)
    assert low < 0.5 < high
    for defense_set in (DefenseSet(data, mislabeled), DefenseSet(mislabeled, data)):
        first = FirstChannels().repair(trained, defense_set, rng=rng()).sweep[0]
        assert first.accuracy == pytest.approx((high + low) / 2)


def test_high_values_become_low_scores_that_compare_across_layers():
    values = {"a": [0.0, 2.0], "b": [100.0, 100.0, 100.0, 500.0], "c": [7.0]}
    score = suspicion_to_score({name: torch.tensor(value) for name, value in values.items()})
    assert score["a"].tolist() == [1, -1]
    assert score["b"].tolist() == pytest.approx([3**-0.5] * 3 + [-(3**0.5)])
    assert score["c"].tolist() == [0]
