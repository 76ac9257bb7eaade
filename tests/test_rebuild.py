"""Rebuilding: pruned neurons stay pruned, the others learn what the given model does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnp.detection.base import RecoveredTrigger
from rnp.errors import UserError
from rnp.neurons.masks import prune, rank_neurons, unit_mask
from rnp.rebuild import Rebuild
from rnp.training.augment import Augment
from rnp.training.predict import predict
from rnp.types import to_floats

PLAIN = Augment(crop=0, flip=False)
METHOD = Rebuild(steps=60, batch_size=20, augment=PLAIN)


@pytest.fixture
def data(toy_set):
    return toy_set(80)


@pytest.fixture
def neurons(trained):
    """Every third one."""
    return rank_neurons(unit_mask(trained))[::3]


@pytest.fixture
def pruned(trained, neurons):
    return prune(trained, neurons)


def distance(one: nn.Module, other: nn.Module, data) -> float:
    logits = [predict(model, data.images).log_softmax(1) for model in (one, other)]
    return F.kl_div(*logits, log_target=True, reduction="batchmean").item()


def state_equal(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_it_comes_back_to_the_given_model_without_the_pruned_neurons(
    trained, pruned, neurons, data, toy_set, rng
):
    held_out = toy_set(80, seed=5)
    rebuilt = METHOD(trained, pruned, neurons, data, rng=rng())
    assert distance(rebuilt, trained, held_out) < 0.3 * distance(pruned, trained, held_out)
    assert state_equal(rebuilt, prune(rebuilt, neurons))


def test_arguments_and_statistics_stay_as_they_are(trained, pruned, neurons, data, rng, unchanged):
    rebuilt = METHOD(unchanged(trained), unchanged(pruned), neurons, data, rng=rng())
    statistics = {n: b for n, b in pruned.named_buffers() if "running" in n or "num_" in n}
    buffers = dict(rebuilt.named_buffers())
    assert statistics and all(torch.equal(buffers[n], b) for n, b in statistics.items())
    assert not any(module.training for module in rebuilt.modules())


def test_labels_do_not_matter(trained, pruned, neurons, data, rng):
    """The targets are the outputs of the given model."""
    mislabeled = type(data)(data.images, data.labels.roll(1), data.classes)
    results = [METHOD(trained, pruned, neurons, d, rng=rng()) for d in (data, mislabeled)]
    assert state_equal(*results)


def test_no_steps_leave_the_pruned_model(trained, pruned, neurons, data, rng):
    rebuilt = Rebuild(steps=0)(trained, pruned, neurons, data, rng=rng())
    assert state_equal(rebuilt, pruned) and rebuilt is not pruned


def test_the_loss_is_the_divergence_at_the_temperature(rng):
    """Closed form: T² times the mean over images of Σ p log(p / q)."""
    logits, targets = torch.randn(2, 5, 4, generator=rng())
    p, q = (values.div(3).softmax(1) for values in (targets, logits))
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert Rebuild(temperature=3.0).divergence(logits, targets).item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def square(label: int, size: int) -> RecoveredTrigger:
    mask = torch.zeros(size, size)
    mask[:4, :4] = 1
    return RecoveredTrigger(label, mask, torch.ones(3, size, size), 1.0, 0.0)


def test_a_trigger_is_ignored_afterwards(trained, data, rng):
    """A white corner moves the given model more often than the rebuilt one."""
    trigger = square(0, data.shape[1])
    method = Rebuild(steps=80, batch_size=20, augment=PLAIN, distort_fraction=0)
    rebuilt = method(trained, trained, [], data, rng=rng(), triggers=[trigger])
    stamped = trigger.apply(to_floats(data.images))

    def shift(model: nn.Module) -> float:
        before, after = (predict(model, images).softmax(1) for images in (data.images, stamped))
        return (before - after).abs().sum(1).mean().item()

    assert shift(rebuilt) < 0.7 * shift(trained)


def test_fractions_of_the_images_are_changed(rng):
    images = torch.full((600, 3, 16, 16), 0.5)
    trigger = square(0, 16)
    only_triggers = Rebuild(distort_fraction=0, trigger_fraction=0.25)
    changed = only_triggers.add_changes(images, [trigger], rng()) != images
    carriers = changed.flatten(1).any(1)
    assert 0.2 < carriers.float().mean() < 0.3
    assert torch.equal(changed[carriers][0].any(0), trigger.mask.bool())
    half = Rebuild(distort_fraction=0.5).add_changes(images, [], rng())
    assert 0.2 < (half != images).flatten(1).any(1).float().mean() < 0.5  # a warp of gray is gray
    nothing = Rebuild(distort_fraction=0).add_changes(images, [], rng())
    assert torch.equal(nothing, images)


@pytest.mark.parametrize("side, fraction", [(5, 0.4), (6, 0.2)])
def test_half_as_many_images_carry_a_trigger_that_is_not_local(side, fraction, rng):
    """A tenth of 256 pixels are 25."""
    images = torch.full((2000, 3, 16, 16), 0.5)
    mask = torch.zeros(16, 16)
    mask[:side, :side] = 1
    trigger = RecoveredTrigger(0, mask, torch.ones(3, 16, 16), 1.0, 0.0)
    changed = Rebuild(distort_fraction=0).add_changes(images, [trigger], rng()) != images
    assert changed.flatten(1).any(1).float().mean() == pytest.approx(fraction, abs=0.03)


def test_it_is_repeatable_and_draws_from_its_generator(trained, pruned, neurons, data, rng):
    results = [METHOD(trained, pruned, neurons, data, rng=rng(seed)) for seed in (1, 1, 2)]
    assert state_equal(results[0], results[1]) and not state_equal(results[0], results[2])


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        ("lr", 0, "above 0"),
        ("steps", -1, "0 or more"),
        ("temperature", 0, "above 0"),
        ("distort_fraction", 1.5, r"in \[0, 1\]"),
        ("trigger_fraction", -0.1, r"in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError, match=rf"{name} must be {bounds}, got {value}"):
        Rebuild(**{name: value})
