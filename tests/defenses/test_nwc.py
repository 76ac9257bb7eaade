"""Neuron weight change: which kernels unlearning moved."""

import copy
from dataclasses import dataclass

import pytest
import torch

from rnp.defenses.nwc import NWC
from rnp.neurons.masks import rank_neurons
from rnp.types import DefenseSet
from rnp.unlearn import Unlearn, Unlearned


@pytest.fixture
def defense_set(toy_set):
    return DefenseSet(toy_set(20, seed=3), toy_set(20, seed=4))


@dataclass(frozen=True, kw_only=True)
class Planted(Unlearn):
    """Moves one kernel by half a unit up and down, and what is no kernel by more."""

    def __call__(self, model, clean, *, rng, on_epoch=lambda _: None):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            moved.conv2.weight[3] += 0.5 * (-1.0) ** torch.arange(8)[:, None, None]
            moved.bn1.weight += 9
            moved.fc.weight += 9
        return Unlearned(moved, {}, [], True, 1, 0.5, 0)


def test_the_change_is_summed_over_the_kernel(trained, defense_set, rng):
    score = NWC(unlearn=Planted()).score(trained, defense_set, rng=rng())
    assert score["bn2"].tolist() == pytest.approx([0, 0, 0, -0.5 * 8 * 9, 0, 0, 0, 0], abs=1e-4)
    assert not score["bn1"].any()
    assert rank_neurons(score)[0] == ("bn2", 3)


def test_it_unlearns_a_copy_on_the_first_half_of_the_images(trained, defense_set, rng, unchanged):
    unlearn = Unlearn(until_collapse=False, lr=0.01)
    rows = []
    score = NWC(unlearn=unlearn).score(
        unchanged(trained), defense_set, rng=rng(1), on_epoch=rows.append
    )
    unlearned = unlearn(trained, defense_set.train, rng=rng(1))
    assert rows == unlearned.trajectory != []
    for layer, convolution in (("bn1", "conv1"), ("bn2", "conv2")):
        change = getattr(unlearned.model, convolution).weight - getattr(trained, convolution).weight
        expected = [-kernel.abs().sum().item() for kernel in change]
        assert score[layer].tolist() == pytest.approx(expected)
    assert score["bn2"].min() < 0
    assert not score["bn2"].requires_grad


def test_unlearning_ends_at_the_stop():
    assert not NWC().unlearn.until_collapse
