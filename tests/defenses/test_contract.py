"""What every defense keeps to: a new file in rnp/defenses is tested from its first day."""

import dataclasses

import pytest
import torch

from rnp import registry
from rnp.defenses.base import PruningDefense, suspicion_to_score
from rnp.neurons.masks import maskable, unit_mask, prune
from rnp.prune import Prune
from rnp.training.predict import accuracy
from rnp.types import DefenseSet, ImageSet

TOY = {
    "fst": {"steps": 200, "alpha": 0.02}
}  # a fresh classifier needs its steps, and finds only eight features


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


def test_the_model_and_the_images_are_left_alone(defense, trained, defense_set, unchanged, rng):
    images, state = defense_set.train.images.clone(), torch.get_rng_state()
    repaired = defense.repair(unchanged(trained), defense_set, rng=rng())
    assert repaired.model is not trained and not repaired.model.training and not trained.training
    assert torch.equal(defense_set.train.images, images) and torch.equal(
        torch.get_rng_state(), state
    )
    assert repaired.model.state_dict().keys() == trained.state_dict().keys(), (
        "the same architecture"
    )


def test_the_generator_decides(defense, trained, defense_set, rng):
    one, same = (
        defense.repair(trained, defense_set, rng=rng(1)).model.state_dict() for _ in range(2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_a_benign_model_stays_useful(defense, trained, defense_set, toy_set, rng):
    repaired = defense.repair(trained, defense_set, rng=rng())
    assert (
        accuracy(repaired.model, toy_set(80, seed=9))
        > accuracy(trained, toy_set(80, seed=9)) - 0.15
    )


def test_a_pruning_defense_shows_its_sweep(defense, trained, defense_set, rng):
    repaired = defense.repair(trained, defense_set, rng=rng())
    assert isinstance(defense, PruningDefense) == bool(repaired.sweep)
    assert repaired.chosen in repaired.sweep or not repaired.sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstChannels(PruningDefense):
    """Distrusts the channels of the first layer, in order."""

    def score(self, model, defense_set, *, rng, on_epoch=lambda _: None):
        mask = unit_mask(model)
        first = next(iter(maskable(model)))
        mask[first] = torch.arange(len(mask[first])) / 100
        return mask


def test_a_score_is_all_that_a_pruning_defense_needs(trained, defense_set, rng):
    repaired = FirstChannels(prune=Prune(rule="number", num_neurons=2)).repair(
        trained, defense_set, rng=rng()
    )
    expected = prune(trained, [("bn1", 0), ("bn1", 1)]).state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in repaired.model.state_dict().items()
    )
    assert repaired.chosen.pruned == 2 and repaired.chosen.threshold == pytest.approx(0.01)


def test_the_sweep_is_measured_on_all_of_the_defense_set(trained, toy_set, rng):
    data = toy_set(40)
    wrong = ImageSet(data.images, data.labels.roll(1), data.classes)
    right, mistaken = accuracy(trained, data), accuracy(trained, wrong)
    for defense_set in (DefenseSet(data, wrong), DefenseSet(wrong, data)):
        first = FirstChannels().repair(trained, defense_set, rng=rng()).sweep[0]
        assert first.accuracy == pytest.approx((right + mistaken) / 2) and mistaken < 0.5 < right


def test_high_values_become_low_scores_that_compare_across_layers():
    values = {"a": [0.0, 2.0], "b": [100.0, 100.0, 100.0, 500.0], "c": [7.0]}
    found = suspicion_to_score({name: torch.tensor(each) for name, each in values.items()})
    assert found["a"].tolist() == [1, -1] and found["c"].tolist() == [0]
    assert found["b"].tolist() == pytest.approx([3**-0.5] * 3 + [-(3**0.5)])
