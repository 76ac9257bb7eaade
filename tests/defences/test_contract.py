"""What every defence keeps to: a new file in rnp/defences is tested from its first day."""

import dataclasses

import pytest
import torch

from rnp import registry
from rnp.defences.base import PruningDefence, highest_first
from rnp.masks import maskable, ones, prune
from rnp.prune import Prune
from rnp.training import accuracy
from rnp.types import DefenceSet, ImageSet

TOY = {
    "fst": {"steps": 200, "alpha": 0.02}
}  # a fresh classifier needs its steps, and finds only eight features


@pytest.fixture(params=registry.names("defence"))
def defence(request):
    """The defaults, but short: no run of a toy needs hundreds of steps."""
    method = registry.load("defence", request.param)()
    short = {
        field.name: min(getattr(method, field.name), 20)
        for field in dataclasses.fields(method)
        if field.name in ("steps", "epochs", "rounds")
    }
    return dataclasses.replace(method, **(short | TOY.get(request.param, {})))


@pytest.fixture
def defence_set(toy_set):
    return DefenceSet(toy_set(40, seed=3), toy_set(40, seed=4))


def test_the_model_and_the_images_are_left_alone(defence, trained, defence_set, unchanged, rng):
    images, state = defence_set.train.images.clone(), torch.get_rng_state()
    repaired = defence.repair(unchanged(trained), defence_set, rng=rng())
    assert repaired.model is not trained and not repaired.model.training and not trained.training
    assert torch.equal(defence_set.train.images, images) and torch.equal(
        torch.get_rng_state(), state
    )
    assert repaired.model.state_dict().keys() == trained.state_dict().keys(), (
        "the same architecture"
    )


def test_the_generator_decides(defence, trained, defence_set, rng):
    one, same = (
        defence.repair(trained, defence_set, rng=rng(1)).model.state_dict() for _ in range(2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_a_benign_model_stays_useful(defence, trained, defence_set, toy_set, rng):
    repaired = defence.repair(trained, defence_set, rng=rng())
    assert (
        accuracy(repaired.model, toy_set(80, seed=9))
        > accuracy(trained, toy_set(80, seed=9)) - 0.15
    )


def test_a_pruning_defence_shows_its_sweep(defence, trained, defence_set, rng):
    repaired = defence.repair(trained, defence_set, rng=rng())
    assert isinstance(defence, PruningDefence) == bool(repaired.sweep)
    assert repaired.chosen in repaired.sweep or not repaired.sweep


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstChannels(PruningDefence):
    """Distrusts the channels of the first layer, in order."""

    def score(self, model, defence_set, *, rng, on_epoch=lambda _: None):
        mask = ones(model)
        first = next(iter(maskable(model)))
        mask[first] = torch.arange(len(mask[first])) / 100
        return mask


def test_a_score_is_all_that_a_pruning_defence_needs(trained, defence_set, rng):
    repaired = FirstChannels(prune=Prune(rule="number", number=2)).repair(
        trained, defence_set, rng=rng()
    )
    expected = prune(trained, [("bn1", 0), ("bn1", 1)]).state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in repaired.model.state_dict().items()
    )
    assert repaired.chosen.pruned == 2 and repaired.chosen.threshold == pytest.approx(0.01)


def test_the_sweep_is_measured_on_all_of_the_defence_set(trained, toy_set, rng):
    data = toy_set(40)
    wrong = ImageSet(data.images, data.labels.roll(1), data.classes)
    right, mistaken = accuracy(trained, data), accuracy(trained, wrong)
    for defence_set in (DefenceSet(data, wrong), DefenceSet(wrong, data)):
        first = FirstChannels().repair(trained, defence_set, rng=rng()).sweep[0]
        assert first.accuracy == pytest.approx((right + mistaken) / 2) and mistaken < 0.5 < right


def test_high_values_become_low_scores_that_compare_across_layers():
    values = {"a": [0.0, 2.0], "b": [100.0, 100.0, 100.0, 500.0], "c": [7.0]}
    found = highest_first({name: torch.tensor(each) for name, each in values.items()})
    assert found["a"].tolist() == [1, -1] and found["c"].tolist() == [0]
    assert found["b"].tolist() == pytest.approx([3**-0.5] * 3 + [-(3**0.5)])
