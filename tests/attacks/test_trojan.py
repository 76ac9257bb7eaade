"""The patch brings planted neurons to the wanted activation, those for the target label."""

import copy

import pytest
import torch
from torch import nn

from rnp.attacks.trojan import Trojan
from rnp.errors import UserError
from rnp.models.features import features, head
from rnp.types import ImageSet


@pytest.fixture
def planted(rng):
    """Linear features: number 1 speaks for label 0, number 2 against it, number 3 for label 1."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4, bias=False), nn.Linear(4, 2))
    net.requires_grad_(False)
    net[1].weight.copy_(torch.randn(net[1].weight.shape, generator=rng(1)))
    net[2].weight.copy_(torch.tensor([[0, 1, -2, 0], [0, 0, 0, 3.0]]))
    return net


def gray(level: int) -> ImageSet:
    images = torch.full((20, 3, 8, 8), level, dtype=torch.uint8)
    return ImageSet(images, torch.arange(20) % 2, ("a", "b"))


@pytest.mark.parametrize(
    "options, neuron", [({}, 1), ({"target_label": 1}, 3), ({"label_mode": "all_to_all"}, 3)]
)
def test_pixels_follow_the_weights_of_the_neuron(options, neuron, planted, rng):
    """For an activation out of reach, a pixel becomes 1 if its weight is positive, else 0."""
    planted[1].weight[neuron].abs_()  # for a positive activation on gray
    planted[1].weight[neuron, ::2] *= -0.5
    attack = Trojan(neurons=1, margin=1, **options)
    trigger = attack.make_trigger(gray(128), rng=rng(), surrogate=planted)
    wanted = (planted[1].weight[neuron].view(3, 8, 8) > 0).float()
    assert torch.equal(trigger.pattern[:, 4:7, 4:7], wanted[:, 4:7, 4:7])


def test_an_activation_within_reach_is_met(planted, rng):
    """Feature 1 is the mean of the patch, .2 on the clean images."""
    weight = torch.zeros(3, 8, 8)
    weight[:, 5:, 5:] = 1 / 27
    planted[1].weight[1] = weight.flatten()
    attack = Trojan(neurons=1, margin=0, target_activation=3)
    trigger = attack.make_trigger(gray(51), rng=rng(), surrogate=planted)
    assert trigger.pattern[:, 5:, 5:].mean().item() == pytest.approx(0.6, abs=0.02)


def test_the_largest_weights_for_the_label_choose_the_neurons(planted):
    attack = Trojan(neurons=2)
    assert attack._choose_neurons(head(planted)).tolist()[0] == 1
    planted[2].weight[0] = torch.tensor([0.5, -9, 2, 1])
    assert attack._choose_neurons(head(planted)).tolist() == [2, 3]


def test_the_patch_excites_a_trained_model_more_than_noise_does(trained, toy_set, rng):
    clean = toy_set(80)
    images = clean.as_floats()[clean.labels != 0]
    neuron = head(trained).weight[0].argmax()
    trigger = Trojan(neurons=1).make_trigger(clean, rng=rng(), surrogate=trained)
    noise = copy.deepcopy(trigger)
    noise.pattern.uniform_(generator=rng(5))
    with torch.no_grad():
        clean, with_noise, with_trigger = (
            features(trained, x)[0][:, neuron].mean()
            for x in (images, noise(images), trigger(images))
        )
    assert with_trigger > 1.5 * with_noise
    assert with_trigger > 1.5 * clean


@pytest.mark.parametrize("size, margin", [(3, 4), (2, 0)])
def test_size_and_margin_place_the_patch(size, margin, toy_set, toy_model, rng):
    attack = Trojan(size=size, margin=margin)
    trigger = attack.make_trigger(toy_set(10), rng=rng(), surrogate=toy_model())
    line = list(range(8 - margin - size, 8 - margin))
    assert trigger.support.nonzero().tolist() == [[y, x] for y in line for x in line]
    assert trigger.pattern[:, ~trigger.support].sum() == 0
    assert set(trigger.weight.unique().tolist()) == {0, 1}


def test_a_model_in_training_mode_can_be_used_and_stays_in_it(toy_set, toy_model, unchanged, rng):
    clean = toy_set(20)
    model = toy_model()
    expected = Trojan().make_trigger(clean, rng=rng(), surrogate=model)
    trigger = Trojan().make_trigger(clean, rng=rng(), surrogate=unchanged(model.train()))
    assert torch.equal(trigger.pattern, expected.pattern)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.bn1.training


@pytest.mark.parametrize(
    "options, message",
    [
        ({"size": 9}, "a patch of size 9 with margin 4 does not fit 8x8 images"),
        ({"size": 0}, "size 0 .* does not fit"),
        ({"margin": 6}, "margin 6 does not fit"),
        ({"margin": -1}, "margin -1 does not fit"),
        ({"neurons": 9}, "neurons must be at most 8, the features of the surrogate, got 9"),
        ({"neurons": 0}, "neurons must be above 0, got 0"),
        ({"steps": 0}, "steps must be above 0, got 0"),
        ({"lr": -1}, "lr must be above 0, got -1"),
        ({"target_activation": float("nan")}, "target_activation must be above 0, got nan"),
    ],
)
def test_impossible_settings_are_refused(options, message, toy_set, toy_model, rng):
    with pytest.raises(UserError, match=message):
        Trojan(**options).make_trigger(toy_set(4), rng=rng(), surrogate=toy_model())


def test_it_needs_a_benign_model(toy_set, rng):
    with pytest.raises(UserError, match="trojan needs a benign model; pass surrogate="):
        Trojan().make_trigger(toy_set(4), rng=rng())
