"""Adversarial neuron pruning: the changed forward pass, the ascent, the masks, and a channel that
is active only under a change.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from rnp.defenses.anp import ANP, forward_changed
from rnp.errors import UserError
from rnp.neurons.masks import rank_neurons, unit_mask
from rnp.recover import Recover
from rnp.training.augment import Augment
from rnp.types import DefenseSet

PLAIN = Augment(crop=0, flip=False)


@pytest.fixture
def defense_set(toy_set):
    return DefenseSet(toy_set(40, seed=3), toy_set(8, seed=4))


@pytest.fixture
def random(toy_model, rng):
    """Values like those of a mask, from a seed."""
    return lambda seed: {
        name: torch.rand(len(value), generator=rng(seed))
        for name, value in unit_mask(toy_model()).items()
    }


@pytest.mark.parametrize("train", [False, True])
def test_the_changed_pass_by_hand(train, toy_model, toy_set, random):
    model = toy_model().train(train)
    by_hand = copy.deepcopy(model)
    images = toy_set(8).as_floats()
    mask, scales, biases = random(0), random(1), random(2)
    with torch.no_grad():
        for name in mask:
            by_hand.get_submodule(name).weight *= mask[name] + scales[name]
            by_hand.get_submodule(name).bias *= 1 + biases[name]
    logits = forward_changed(model, images, mask, scales, biases)
    assert torch.allclose(logits, by_hand(images), atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_small_change_follows_the_gradient(steps, toy_model, toy_set, rng):
    """Where the loss is nearly linear, every scale and bias ends on the side that raises it, by
    epsilon at most.
    """
    model = toy_model().requires_grad_(False)
    data = toy_set(40)
    epsilon = 1e-4
    scales, biases = ANP(epsilon=epsilon, perturb_steps=steps).worst_change(
        model, data.as_floats(), data.labels, unit_mask(model), rng=rng()
    )
    by_hand = copy.deepcopy(model).requires_grad_(True)
    F.cross_entropy(by_hand(data.as_floats()), data.labels).backward()
    for changes, parameter in ((scales, "weight"), (biases, "bias")):
        for name, value in changes.items():
            p = getattr(by_hand.get_submodule(name), parameter)
            slope = (p.grad * p).detach()  # with respect to a relative change
            steep = slope.abs() > slope.abs().max() / 20
            assert steep.sum() > 2
            assert (value * slope >= 0)[steep].all()
            assert value.abs().max() <= epsilon
            assert not value.requires_grad


def test_a_large_change_raises_the_loss(trained, toy_set, random, rng):
    data = toy_set(40)
    images = data.as_floats()
    model = trained.requires_grad_(False)
    mask = unit_mask(model)

    def loss(logits):
        return F.cross_entropy(logits, data.labels).item()

    def random_change(seed):
        return {name: 0.8 * value - 0.4 for name, value in random(seed).items()}

    scales, biases = ANP().worst_change(model, images, data.labels, mask, rng=rng())
    worst = loss(forward_changed(model, images, mask, scales, biases))
    by_chance = [
        loss(forward_changed(model, images, mask, random_change(i), random_change(i + 20)))
        for i in range(20)
    ]
    assert worst > max(by_chance) > loss(model(images))


def test_without_change_it_is_recovery_from_the_given_model(trained, defense_set, rng, unchanged):
    options = {"steps": 12, "batch_size": 40, "augment": PLAIN}
    score = ANP(epsilon=0, **options).score(unchanged(trained), defense_set, rng=rng())
    expected = Recover(alpha=1.0, **options)(trained, defense_set.train, rng=rng()).mask
    assert all(torch.allclose(score[name], expected[name], atol=1e-3) for name in score)
    assert min(value.min() for value in score.values()) < 0.95, "the masks moved"


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_one_step_by_hand(alpha, toy_model, defense_set, monkeypatch, random, rng):
    model, data = toy_model(), defense_set.train
    worst = random(1), random(2)
    monkeypatch.setattr(ANP, "worst_change", lambda *_, **__: worst)
    anp = ANP(alpha=alpha, steps=1, batch_size=40, lr=0.5, augment=PLAIN)
    score = anp.score(model, defense_set, rng=rng())

    def loss(mask, scales, biases):
        x = data.as_floats()
        for name in ("1", "2"):
            norm = getattr(model, f"bn{name}")
            weight = norm.weight.detach() * (mask[f"bn{name}"] + scales[f"bn{name}"])
            bias = norm.bias.detach() * (1 + biases[f"bn{name}"])
            x = getattr(model, f"conv{name}")(x)
            x = F.relu(F.batch_norm(x, None, None, weight, bias, training=True))
        return F.cross_entropy(model.fc(x.mean((2, 3))), data.labels)

    mask = {name: value.requires_grad_() for name, value in unit_mask(model).items()}
    none = {name: torch.zeros(8) for name in mask}
    (alpha * loss(mask, none, none) + (1 - alpha) * loss(mask, *worst)).backward()
    assert any((value.grad > 0.01).any() for value in mask.values())
    for name, value in mask.items():
        assert torch.allclose(score[name], (1 - 0.5 * value.grad).clamp(0, 1), atol=1e-5)


def test_a_channel_that_a_change_activates_comes_first(trained, defense_set, rng):
    """It is silent on clean images by a small margin and leads to class 0: the mask without change
    cannot show it.
    """
    with torch.no_grad():
        trained.bn2.weight[5] = 0.3
        trained.bn2.bias[5] = -0.7
        trained.fc.weight[:, 5] = 0
        trained.fc.weight[0, 5] = 60

    def first(epsilon):
        anp = ANP(epsilon=epsilon, steps=30, augment=PLAIN)
        return rank_neurons(anp.score(trained, defense_set, rng=rng()))[0]

    assert first(0.4) == ("bn2", 5)
    assert first(0) != ("bn2", 5)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("epsilon", 40, r"anp\.epsilon must be in \[0, 1\], got 40; it is a fraction, not percent"),
        ("epsilon", -0.1, r"anp\.epsilon must be in \[0, 1\], got -0\.1"),
        ("alpha", 1.1, r"anp\.alpha must be in \[0, 1\], got 1\.1"),
        ("alpha", -0.1, r"anp\.alpha must be in \[0, 1\], got -0\.1"),
        ("perturb_steps", 0, r"anp\.perturb_steps must be above 0, got 0"),
        ("lr", 0, r"anp\.lr must be above 0, got 0"),
        ("batch_size", 0, r"anp\.batch_size must be above 0, got 0"),
        ("steps", 0, r"anp\.steps must be above 0, got 0"),
    ],
)
def test_impossible_settings_are_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        ANP(**{name: value})
