"""Adversarial neuron pruning: the perturbed pass, the ascent, the masks, and a channel that only a
change wakes.
"""

import copy

import pytest
import torch
import torch.nn.functional as F

from rnp.defenses.anp import ANP, changed
from rnp.errors import UserError
from rnp.neurons.masks import unit_mask, rank_neurons
from rnp.recover import Recover
from rnp.training.augment import Augment
from rnp.types import DefenseSet

STILL = Augment(crop=0, flip=False)


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
    model, images = toy_model().train(train), toy_set(8).as_floats()
    mask, scales, biases, by_hand = random(0), random(1), random(2), copy.deepcopy(model)
    with torch.no_grad():
        for name in mask:
            by_hand.get_submodule(name).weight *= mask[name] + scales[name]
            by_hand.get_submodule(name).bias *= 1 + biases[name]
    assert torch.allclose(changed(model, images, mask, scales, biases), by_hand(images), atol=1e-6)


@pytest.mark.parametrize("ascent", [1, 2])
def test_a_small_change_follows_the_gradient(ascent, toy_model, toy_set, rng):
    """Where the loss is all but linear, every scale and bias ends on the side that raises it, by
    epsilon at most.
    """
    model, data, epsilon = toy_model().requires_grad_(False), toy_set(40), 1e-4
    mask = unit_mask(model)
    scales, biases = ANP(epsilon=epsilon, perturb_steps=ascent).worst(
        model, data.as_floats(), data.labels, mask, rng()
    )
    by_hand = copy.deepcopy(model).requires_grad_(True)
    F.cross_entropy(by_hand(data.as_floats()), data.labels).backward()
    for found, parameter in ((scales, "weight"), (biases, "bias")):
        for name, value in found.items():
            p = getattr(by_hand.get_submodule(name), parameter)
            slope = (p.grad * p).detach()  # with respect to a relative change
            steep = slope.abs() > slope.abs().max() / 20
            assert (
                steep.sum() > 2
                and (value * slope >= 0)[steep].all()
                and value.abs().max() <= epsilon
            )
            assert not value.requires_grad


def test_a_large_change_raises_the_error(trained, toy_set, random, rng):
    data, model = toy_set(40), trained.requires_grad_(False)
    mask, loss = unit_mask(model), lambda logits: F.cross_entropy(logits, data.labels).item()
    scales, biases = ANP().worst(model, data.as_floats(), data.labels, mask, rng())
    drawn = [
        ({name: 0.8 * value - 0.4 for name, value in random(seed).items()} for seed in (i, i + 20))
        for i in range(20)
    ]
    by_chance = [loss(changed(model, data.as_floats(), mask, *each)) for each in drawn]
    assert (
        loss(changed(model, data.as_floats(), mask, scales, biases))
        > max(by_chance)
        > loss(model(data.as_floats()))
    )


def test_without_change_it_is_recovery_from_the_victim(trained, defense_set, rng, unchanged):
    options = dict(steps=12, batch_size=40, augment=STILL, precision="fp32")
    found = ANP(epsilon=0, **options).score(unchanged(trained), defense_set, rng=rng())
    expected = Recover(alpha=1.0, **options)(trained, defense_set.train, rng=rng()).mask
    assert all(torch.allclose(found[name], expected[name], atol=1e-3) for name in found)
    assert min(value.min() for value in found.values()) < 0.95, "the masks moved"


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_one_step_by_hand(alpha, toy_model, defense_set, monkeypatch, random, rng):
    model, data, worst = toy_model(), defense_set.train, (random(1), random(2))
    monkeypatch.setattr(ANP, "worst", lambda *_: worst)
    anp = ANP(alpha=alpha, steps=1, batch_size=40, lr=0.5, augment=STILL, precision="fp32")
    found = anp.score(model, defense_set, rng=rng())

    def forward(mask, scales, biases):
        x = data.as_floats()
        for name in ("1", "2"):
            norm = getattr(model, f"bn{name}")
            weight = norm.weight.detach() * (mask[f"bn{name}"] + scales[f"bn{name}"])
            bias = norm.bias.detach() * (1 + biases[f"bn{name}"])
            x = F.relu(
                F.batch_norm(
                    getattr(model, f"conv{name}")(x), None, None, weight, bias, training=True
                )
            )
        return F.cross_entropy(model.fc(x.mean((2, 3))), data.labels)

    mask = {name: value.requires_grad_() for name, value in unit_mask(model).items()}
    none = {name: torch.zeros(8) for name in mask}
    (alpha * forward(mask, none, none) + (1 - alpha) * forward(mask, *worst)).backward()
    assert any((value.grad > 0.01).any() for value in mask.values())
    for name, value in mask.items():
        assert torch.allclose(found[name], (1 - 0.5 * value.grad).clamp(0, 1), atol=1e-5)


def test_a_channel_that_a_change_wakes_comes_first(trained, defense_set, rng):
    """Silent on clean images by a small margin, and tied to class 0: the mask without change
    cannot tell it.
    """
    with torch.no_grad():
        trained.bn2.weight[5], trained.bn2.bias[5] = 0.3, -0.7
        trained.fc.weight[:, 5] = 0
        trained.fc.weight[0, 5] = 60
    options = dict(steps=30, augment=STILL, precision="fp32")
    first = [
        rank_neurons(ANP(epsilon=epsilon, **options).score(trained, defense_set, rng=rng()))[0]
        for epsilon in (0.4, 0)
    ]
    assert first[0] == ("bn2", 5) != first[1]


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("epsilon", 40, r"anp\.epsilon must be in \[0, 1\], got 40; it is a fraction, not percent"),
        ("epsilon", -0.1, "epsilon"),
        ("alpha", 1.1, r"anp\.alpha must be in \[0, 1\]"),
        ("alpha", -0.1, "alpha"),
        *(
            (name, 0, rf"anp\.{name} must be above 0, got 0")
            for name in ("ascent", "lr", "batch_size", "steps")
        ),
    ],
)
def test_impossible_settings_are_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        ANP(**{name: value})
