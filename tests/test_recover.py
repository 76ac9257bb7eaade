"""Recovery of masks: equals the published loop, and ranks a planted channel first."""

import copy

import pytest
import torch
from batches import batches
from torch import nn

from benchmarks.reference_rnp import recovery
from rnp.errors import UserError
from rnp.neurons.masks import rank_neurons
from rnp.recover import Recover
from rnp.training.augment import Augment
from rnp.training.device import use_precision
from rnp.training.predict import accuracy, predict
from rnp.unlearn import Unlearn

PLAIN = Augment(crop=0, flip=False)
SHORT = Recover(steps=30, batch_size=16, augment=PLAIN)


@pytest.fixture(scope="module")
def _unlearned(_trained, toy_set, rng):
    unlearn = Unlearn(lr=0.03, batch_size=8, augment=PLAIN, until_collapse=False, epochs=10)
    return unlearn(_trained, toy_set(60), rng=rng()).model


@pytest.fixture
def unlearned(_unlearned):
    return copy.deepcopy(_unlearned)


@pytest.mark.parametrize("seed", [0, 1])
def test_parity_with_the_published_loop(seed, unlearned, toy_set, rng):
    data = toy_set(60)
    generator = rng(seed)
    sums = {"bn1": torch.zeros(8), "bn2": torch.zeros(8)}

    def add_up(masks):
        for layer, mask in masks.items():
            sums[layer].add_(mask)

    *_, (model, masks) = recovery(
        unlearned, lambda: batches(data, 16, generator), epochs=20, after_step=add_up
    )
    ours = Recover(batch_size=16, augment=PLAIN)(unlearned, data, rng=rng(seed))
    for layer, mask in masks.items():
        assert torch.allclose(ours.final[layer], mask, atol=1e-6)
        assert torch.allclose(ours.mask[layer], sums[layer] / 80, atol=1e-6)
        our_norm = ours.model.get_submodule(layer)
        their_norm = model.get_submodule(layer).norm
        assert torch.allclose(our_norm.running_var, their_norm.running_var, rtol=1e-5)
        # The comparison is not one of masks that never moved.
        assert 0 < (mask < 1).sum() and not torch.allclose(ours.final[layer], ours.mask[layer])


def test_alpha_is_a_factor_on_the_step(unlearned, toy_set, rng):
    def final(lr, alpha):
        recover = Recover(**vars(SHORT) | {"lr": lr, "alpha": alpha})
        result = recover(unlearned, toy_set(60), rng=rng())
        return torch.cat(list(result.final.values()))

    assert torch.allclose(final(0.2, 0.2), final(0.04, 1.0), atol=1e-5)
    assert not torch.allclose(final(0.2, 0.2), final(0.2, 1.0), atol=1e-2)


@pytest.mark.parametrize("rank_by", ["average", "final"])
def test_masks_are_between_0_and_1(rank_by, unlearned, toy_set, rng):
    recover = Recover(lr=5.0, steps=10, batch_size=16, augment=PLAIN, rank_by=rank_by)
    result = recover(unlearned, toy_set(60), rng=rng())
    for mask in (result.mask, result.final):
        values = torch.cat(list(mask.values()))
        assert list(mask) == ["bn1", "bn2"] and not values.requires_grad
        assert values.min() >= 0 and values.max() <= 1
    assert 0.0 in torch.cat(list(result.final.values())), "with such a step some are clipped"


def test_rank_by(unlearned, toy_set, rng):
    average, final = (
        Recover(**vars(SHORT) | {"rank_by": by})(unlearned, toy_set(60), rng=rng())
        for by in ("average", "final")
    )
    assert all(torch.equal(final.mask[layer], average.final[layer]) for layer in final.mask)
    assert not torch.equal(average.mask["bn2"], final.mask["bn2"])


def test_the_unlearned_model_is_left_unchanged(unlearned, unchanged, toy_set, rng):
    result = SHORT(unchanged(unlearned), toy_set(60), rng=rng())
    assert not unlearned.training and not result.model.training


def test_the_recovered_model_is_the_unlearned_one_under_its_mask(unlearned, toy_set, rng):
    """Only the scales and the running statistics may differ."""
    result = SHORT(unlearned, toy_set(60), rng=rng())
    before, after = unlearned.state_dict(), result.model.state_dict()
    for layer, mask in result.final.items():
        assert torch.equal(after[f"{layer}.weight"], before[f"{layer}.weight"] * mask)
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert {"conv1.weight", "conv2.weight", "fc.weight", "fc.bias", "bn1.bias", "bn2.bias"} <= set(
        same
    )


@pytest.mark.parametrize("bn_mode", ["train", "frozen"])
def test_frozen_statistics_stay(bn_mode, unlearned, toy_set, rng):
    result = Recover(**vars(SHORT) | {"bn_mode": bn_mode})(unlearned, toy_set(60), rng=rng())
    assert torch.equal(result.model.bn1.running_mean, unlearned.bn1.running_mean) == (
        bn_mode == "frozen"
    )


def test_the_generator_decides(unlearned, toy_set, rng):
    masks = [SHORT(unlearned, toy_set(60), rng=rng(seed)).mask for seed in (1, 1, 2)]
    assert all(torch.equal(masks[0][layer], masks[1][layer]) for layer in masks[0])
    assert not all(torch.equal(masks[0][layer], masks[2][layer]) for layer in masks[0])


@pytest.mark.parametrize("steps, rows", [(1, 1), (4, 1), (5, 2), (80, 20)])
def test_length_is_in_steps(steps, rows, unlearned, toy_set, rng):
    received = []
    recover = Recover(steps=steps, batch_size=16, augment=PLAIN)
    result = recover(unlearned, toy_set(60), rng=rng(), on_epoch=received.append)
    assert result.history == received and len(received) == rows and received[-1].step == steps


@pytest.mark.parametrize("bn_mode", ["train", "frozen"])
@pytest.mark.parametrize("channel", [2, 5, 6])
def test_a_planted_channel_is_found(channel, bn_mode, trained, toy_set, rng):
    """A channel that forces class 0 on a trained network gets the lowest mask."""
    data = toy_set(60)
    with torch.no_grad():
        trained.bn2.weight[channel] = 5.0
        trained.bn2.bias[channel] = 0.0
        trained.fc.weight[:, channel] = torch.tensor([20.0, 0, 0, 0])
    result = Recover(**vars(SHORT) | {"lr": 0.01, "bn_mode": bn_mode})(trained, data, rng=rng())
    assert accuracy(trained, data) <= 0.5 and accuracy(result.model, data) > 0.8
    assert rank_neurons(result.mask)[0] == rank_neurons(result.final)[0] == ("bn2", channel)


def test_bf16_agrees_roughly(unlearned, toy_set, rng):
    gentle = Recover(**vars(SHORT) | {"lr": 0.02})
    full = gentle(unlearned, toy_set(60), rng=rng())
    with use_precision("bf16"):
        half = gentle(unlearned, toy_set(60), rng=rng())
    for layer, mask in half.mask.items():
        assert torch.allclose(mask, full.mask[layer], atol=0.05)
        assert not torch.equal(mask, full.mask[layer]) and mask.dtype == torch.float32


def test_a_model_without_neurons_is_an_error(toy_set, rng):
    with pytest.raises(UserError, match="neither a normalization"):
        SHORT(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), toy_set(8), rng=rng())


@pytest.mark.parametrize("name", ["lr", "alpha", "steps", "batch_size"])
def test_impossible_settings_are_refused(name):
    with pytest.raises(UserError, match=rf"recover\.{name} must be above 0, got 0"):
        Recover(**{name: 0})


def test_predictions_under_ones_are_those_of_the_unlearned_model(unlearned, toy_set, rng):
    """A step too small to see changes nothing but the running statistics, which `frozen` keeps."""
    recover = Recover(**vars(SHORT) | {"lr": 1e-12, "steps": 1, "bn_mode": "frozen"})
    result = recover(unlearned, toy_set(60), rng=rng())
    images = toy_set(8).images
    assert torch.equal(predict(result.model, images), predict(unlearned, images))
