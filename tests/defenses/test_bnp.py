"""What BatchNorm remembers against what clean images give it."""

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
    layer.running_mean, layer.running_var = torch.tensor(mean), torch.tensor(deviation).square()
    return layer


def test_divergence_is_that_of_gaussians():
    one, other = (
        ([0.0, 1.0, -2.0, 3.0], [1.0, 0.5, 2.0, 3.0]),
        ([0.0, 1.5, 1.0, 3.0], [1.0, 2.0, 0.25, 1.0]),
    )
    expected = kl_divergence(
        *(Normal(torch.tensor(mean), torch.tensor(deviation)) for mean, deviation in (one, other))
    )
    assert divergence(norm(*one), norm(*other)).tolist() == pytest.approx(
        expected.tolist(), abs=1e-5
    )


def test_a_channel_without_variance_is_finite():
    assert divergence(norm([1.0], [0.0]), norm([0.0], [0.0])).isfinite().all()


def test_the_statistics_are_those_of_one_pass_in_train_mode(trained, toy_set, unchanged):
    data, by_hand = toy_set(30), copy.deepcopy(trained).train()
    for layer in (by_hand.bn1, by_hand.bn2):
        layer.momentum = 1.0
    by_hand(data.as_floats())
    found = with_statistics_of(data, unchanged(trained))
    assert torch.equal(found.conv1.weight, trained.conv1.weight)
    for name, layer in maskable(found).items():
        for buffer in ("running_mean", "running_var"):
            assert torch.allclose(
                getattr(layer, buffer), getattr(by_hand.get_submodule(name), buffer), atol=1e-5
            )


def test_batches_are_of_like_sizes_and_count_alike(trained, toy_set, monkeypatch):
    monkeypatch.setattr("rnp.training.predict.EVAL_BATCH", 10)
    data = toy_set(21)
    found = with_statistics_of(data, trained)
    means = [trained.conv1(part).mean((0, 2, 3)) for part in data.as_floats().split(7)]
    assert torch.allclose(found.bn1.running_mean, torch.stack(means).mean(0), atol=1e-5)
    assert found.bn1.num_batches_tracked == 3


def test_dropout_stays_off(trained, toy_set):
    model = nn.Sequential(nn.Dropout(0.9), trained)
    found, expected = (
        with_statistics_of(toy_set(20), model)[1],
        with_statistics_of(toy_set(20), trained),
    )
    assert torch.equal(found.bn2.running_var, expected.bn2.running_var)


def test_a_channel_that_remembers_a_patch_comes_first(toy_model, toy_set, rng):
    """The kernel answers to a checkerboard, which a fifth of the images behind the statistics
    carry.
    """
    model, clean = toy_model(width=16), toy_set(200, seed=5)
    sign = (-1.0) ** (torch.arange(3)[:, None] + torch.arange(3))
    with torch.no_grad():
        model.conv1.weight[7] = sign
    stamped = clean.images.clone()
    stamped[::5, :, 4:, 4:] = (sign[:2, :2].repeat(2, 2) > 0).to(torch.uint8) * 255
    model = with_statistics_of(ImageSet(stamped, clean.labels, clean.classes), model)
    defense_set = DefenseSet(toy_set(40, seed=3), toy_set(40, seed=4))
    assert rank_neurons(BNP().score(model, defense_set, rng=rng()))[0] == ("bn1", 7)


def test_all_images_of_the_defender_count(trained, toy_set, rng):
    a, b = toy_set(20, seed=3), toy_set(20, seed=4)
    one, same, other = (
        BNP().score(trained, DefenseSet(*parts), rng=rng()) for parts in ((a, b), (b, a), (a, a))
    )
    assert torch.allclose(one["bn2"], same["bn2"], atol=1e-3) and not torch.allclose(
        one["bn2"], other["bn2"], atol=1e-3
    )
