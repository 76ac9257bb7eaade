"""RNP as one method: the same numbers as the three stages of the pipeline."""

import pytest
import torch

from rnp.defenses.rnp import RNP
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.seeds import generator, root
from rnp.types import DefenseSet
from rnp.unlearn import Unlearn

SEED = 7
METHODS = {
    "defaults": RNP(),
    "harsh": RNP(
        unlearn=Unlearn(lr=0.02, batch_size=16, epochs=10),
        recover=Recover(steps=20, batch_size=16),
        prune=Prune(max_accuracy_drop=0.3, max_loss_increase=0.2, max_fraction=0.6),
    ),
    "number": RNP(
        unlearn=Unlearn(lr=0.02, batch_size=16, until_collapse=False),
        recover=Recover(steps=5, rank_by="final"),
        prune=Prune(rule="number", num_neurons=3),
    ),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def defense_set(toy_set):
    return DefenseSet(toy_set(40, seed=3), toy_set(40, seed=4))


@pytest.fixture
def stages(method, trained, defense_set):
    """What unlearn, recover and prune compute, each with the generator of its stage."""
    train = defense_set.train
    unlearned = method.unlearn(trained, train, rng=generator(SEED, "unlearn"))
    recovered = method.recover(unlearned.model, train, rng=generator(SEED, "recover"))
    return unlearned, recovered, method.prune(trained, recovered.mask, defense_set.all)


def assert_same_tensors(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_same_results(result, stages):
    unlearned, recovered, pruned = stages
    assert_same_tensors(result.unlearned.model.state_dict(), unlearned.model.state_dict())
    assert result.unlearned.trajectory == unlearned.trajectory != []
    assert_same_tensors(result.recovered.mask, recovered.mask)
    assert_same_tensors(result.recovered.final, recovered.final)
    assert result.recovered.history == recovered.history
    assert_same_tensors(result.model.state_dict(), pruned.model.state_dict())
    assert result.model is result.pruned.model
    assert result.pruned.order == pruned.order
    assert result.sweep == result.pruned.sweep == pruned.sweep
    assert result.chosen == result.pruned.chosen == pruned.chosen


def test_it_equals_the_stages_of_the_pipeline(method, trained, defense_set, stages):
    rows = []
    result = method.repair(trained, defense_set, rng=root(SEED), on_epoch=rows.append)
    assert_same_results(result, stages)
    assert rows == [*result.unlearned.trajectory, *result.recovered.history]


def test_it_goes_on_from_an_unlearned_model(method, trained, defense_set, stages):
    rows = []
    unlearned = stages[0]
    result = method.repair_from(
        trained, unlearned, defense_set, rng=root(SEED), on_epoch=rows.append
    )
    assert result.unlearned is unlearned
    assert_same_results(result, stages)
    assert rows == result.recovered.history


def test_something_is_pruned(trained, defense_set):
    """Else the equalities above would hold for any order of the neurons."""
    pruned = [
        METHODS[name].repair(trained, defense_set, rng=root(SEED)).chosen.pruned
        for name in ("harsh", "number")
    ]
    assert pruned[0] > 3 == pruned[1]


def test_the_model_and_the_generator_stay_as_they_are(method, trained, defense_set, unchanged):
    """Only the seed of the generator counts, so that a second call gives the same result."""
    rng = root(SEED)
    before = rng.get_state()
    first = method.repair(unchanged(trained), defense_set, rng=rng)
    assert torch.equal(rng.get_state(), before)
    torch.rand(3, generator=rng)
    second = method.repair(trained, defense_set, rng=rng)
    assert_same_tensors(first.model.state_dict(), second.model.state_dict())


def test_another_seed_gives_other_masks(trained, defense_set):
    one, other = (
        METHODS["harsh"].repair(trained, defense_set, rng=root(seed)).recovered.mask
        for seed in (SEED, SEED + 1)
    )
    assert not all(torch.equal(one[name], other[name]) for name in one)
