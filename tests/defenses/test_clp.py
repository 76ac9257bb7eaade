"""Channel Lipschitz pruning: the formula, the paper's rule, and what must not matter."""

import numpy as np
import pytest
import torch

from rnp.defenses.clp import CLP
from rnp.neurons.masks import rank_neurons
from rnp.prune import Prune
from rnp.types import DefenseSet


@pytest.fixture
def defense_set(toy_set):
    return DefenseSet(toy_set(20, seed=3), toy_set(20, seed=4))


def test_the_score_by_hand(trained, defense_set, rng):
    score = CLP().score(trained, defense_set, rng=rng())
    for layer, convolution in (("bn1", "conv1"), ("bn2", "conv2")):
        norm = getattr(trained, layer)
        kernels = getattr(trained, convolution).weight.detach().double().numpy()
        constants = []
        for kernel, scale, variance in zip(
            kernels, norm.weight.tolist(), norm.running_var.tolist()
        ):
            largest = np.linalg.svd(kernel.reshape(len(kernel), -1), compute_uv=False)[0]
            constants.append(largest * abs(scale) / np.sqrt(variance + norm.eps))
        expected = [(np.mean(constants) - value) / np.std(constants) for value in constants]
        assert score[layer].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("plant", ["kernel", "scale", "deviation"])
def test_a_planted_channel_comes_first(plant, trained, defense_set, rng):
    """Each factor counts; a negative scale as a positive one."""
    with torch.no_grad():
        if plant == "kernel":
            trained.conv2.weight[5] *= 10
        elif plant == "scale":
            trained.bn2.weight[5] *= -10
        else:
            trained.bn2.running_var[5] /= 100
    assert rank_neurons(CLP().score(trained, defense_set, rng=rng()))[0] == ("bn2", 5)


def test_no_image_decides(trained, defense_set, toy_set, rng):
    others = DefenseSet(toy_set(9, seed=8), toy_set(9, seed=9))
    one, other = (CLP().score(trained, data, rng=rng()) for data in (defense_set, others))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_rule_of_the_paper(toy_model, defense_set, rng):
    """Three deviations above the mean, scale and bias set to 0, whatever the images say."""
    model = toy_model(width=16)
    with torch.no_grad():
        model.conv1.weight[3] *= 30
    rule = Prune(rule="threshold", threshold=-3.0, zero_bias=True)
    repaired = CLP(prune=rule).repair(model, defense_set, rng=rng())
    assert repaired.chosen.pruned == 1
    assert repaired.model.bn1.weight[3] == repaired.model.bn1.bias[3] == 0


def test_a_layer_of_like_channels_suspects_none(toy_model, defense_set, rng):
    score = CLP().score(toy_model(width=1), defense_set, rng=rng())
    assert score["bn1"].tolist() == score["bn2"].tolist() == [0]
