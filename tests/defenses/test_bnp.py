"""The running statistics of BatchNorm against those of clean images."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from rnp.defenses.bnp import BNP, divergence, with_statistics_of
from rnp.neurons.masks import maskable, rank_neurons
from rnp.types import DefenseSet, ImageSet


def norm(mean: list[float], deviation: list[float]) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(len(mean), eps=1e-12)
    layer.running_mean = torch.tensor(mean)
    layer.running_var = torch.tensor(deviation).square()
    return layer


def test_divergence_is_that_of_gaussians():
    running = [0.0, 1.0, -2.0, 3.0], [1.0, 0.5, 2.0, 3.0]
    clean = [0.0, 1.5, 1.0, 3.0], [1.0, 2.0, 0.25, 1.0]
    expected = kl_divergence(*(Normal(*map(torch.tensor, pair)) for pair in (running, clean)))
    computed = divergence(norm(*running), norm(*clean))
    assert computed.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_channel_without_variance_is_finite():
    assert divergence(norm([1.0], [0.0]), norm([0.0], [0.0])).isfinite().all()


def test_the_statistics_are_those_of_one_pass_in_train_mode(trained, toy_set, unchanged):
    data = toy_set(30)
    by_hand = copy.deepcopy(trained).train()
    for layer in (by_hand.bn1, by_hand.bn2):
        layer.momentum = 1.0
    by_hand(data.as_floats())
    copied = with_statistics_of(data, unchanged(trained))
    assert torch.equal(copied.conv1.weight, trained.conv1.weight)
    for name, layer in maskable(copied).items():
        for buffer in ("running_mean", "running_var"):
            expected = getattr(by_hand.get_submodule(name), buffer)
            assert torch.allclose(getattr(layer, buffer), expected, atol=1e-5)


def test_batches_are_of_like_sizes_and_count_alike(trained, toy_set, monkeypatch):
    monkeypatch.setattr("rnp.training.predict.EVAL_BATCH", 10)
    data = toy_set(21)
    copied = with_statistics_of(data, trained)
    means = [trained.conv1(part).mean((0, 2, 3)) for part in data.as_floats().split(7)]
    assert torch.allclose(copied.bn1.running_mean, torch.stack(means).mean(0), atol=1e-5)
    assert copied.bn1.num_batches_tracked == 3


def test_dropout_stays_off(trained, toy_set):
    with_dropout = nn.Sequential(nn.Dropout(0.9), trained)
    copied = with_statistics_of(toy_set(20), with_dropout)[1]
    expected = with_statistics_of(toy_set(20), trained)
    assert torch.equal(copied.bn2.running_var, expected.bn2.running_var)


def test_a_channel_whose_statistics_include_a_patch_comes_first(toy_model, toy_set, rng):
    """The kernel reacts to a checkerboard, which a fifth of the images behind the statistics
    carry.
    """
    model = toy_model(width=16)
    clean = toy_set(200, seed=5)
    sign = (-1.0) ** (torch.arange(3)[:, None] + torch.arange(3))
    with torch.no_grad():
        model.conv1.weight[7] = sign
    triggered = clean.images.clone()
    triggered[::5, :, 4:, 4:] = (sign[:2, :2].repeat(2, 2) > 0).to(torch.uint8) * 255
    model = with_statistics_of(ImageSet(triggered, clean.labels, clean.classes), model)
    defense_set = DefenseSet(toy_set(40, seed=3), toy_set(40, seed=4))
    assert rank_neurons(BNP().score(model, defense_set, rng=rng()))[0] == ("bn1", 7)


def test_all_images_of_the_defender_count(trained, toy_set, rng):
    a, b = toy_set(20, seed=3), toy_set(20, seed=4)
    both, swapped, first_twice = (
        BNP().score(trained, DefenseSet(*parts), rng=rng())["bn2"]
        for parts in ((a, b), (b, a), (a, a))
    )
    assert torch.allclose(both, swapped, atol=1e-3)
    assert not torch.allclose(both, first_twice, atol=1e-3)
