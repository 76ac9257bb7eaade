"""The patch that drives planted neurons furthest, or just as far as asked, for the label asked
for.
"""

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
    """Features linear in the pixels; feature 1 speaks for label 0, feature 2 against it, feature 3
    for label 1.
    """
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 8 * 8, 4, bias=False), nn.Linear(4, 2)
    ).requires_grad_(False)
    net[1].weight.copy_(torch.randn(net[1].weight.shape, generator=rng(1)))
    net[2].weight.copy_(torch.tensor([[0, 1, -2, 0], [0, 0, 0, 3.0]]))
    return net


def gray(level: int) -> ImageSet:
    return ImageSet(
        torch.full((20, 3, 8, 8), level, dtype=torch.uint8), torch.arange(20) % 2, ("a", "b")
    )


@pytest.mark.parametrize(
    "options, neuron", [({}, 1), ({"target_label": 1}, 3), ({"labels": "all_to_all"}, 3)]
)
def test_pixels_go_where_the_neuron_wants_them(options, neuron, planted, rng):
    """An aim out of reach makes every pixel take the end of [0, 1] that its weight points to."""
    planted[1].weight[neuron].abs_()  # for a positive activation on gray
    planted[1].weight[neuron, ::2] *= -0.5
    trigger = Trojan(neurons=1, margin=1, **options).make_trigger(
        gray(128), rng=rng(), surrogate=planted
    )
    wanted = (planted[1].weight[neuron].view(3, 8, 8) > 0).float()
    assert torch.equal(trigger.pattern[:, 4:7, 4:7], wanted[:, 4:7, 4:7])


def test_an_aim_within_reach_is_met(planted, rng):
    """Feature 1 is the mean of the patch, .2 on the clean images."""
    weight = torch.zeros(3, 8, 8)
    weight[:, 5:, 5:] = 1 / 27
    planted[1].weight[1] = weight.flatten()
    trigger = Trojan(neurons=1, margin=0, target_activation=3).make_trigger(
        gray(51), rng=rng(), surrogate=planted
    )
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
        before, with_noise, after = (
            features(trained, stamp(images))[0][:, neuron].mean()
            for stamp in (lambda x: x, noise, trigger)
        )
    assert after > 1.5 * with_noise and after > 1.5 * before


def test_where_it_lies(toy_set, toy_model, rng):
    for size, margin in ((3, 4), (2, 0)):
        trigger = Trojan(size=size, margin=margin).make_trigger(
            toy_set(10), rng=rng(), surrogate=toy_model()
        )
        line = list(range(8 - margin - size, 8 - margin))
        assert trigger.support.nonzero().tolist() == [[y, x] for y in line for x in line]
        assert trigger.pattern[:, ~trigger.support].sum() == 0 and set(
            trigger.weight.unique().tolist()
        ) == {0, 1}


def test_a_model_in_training_mode_serves_and_stays_in_it(toy_set, toy_model, unchanged, rng):
    clean, model = toy_set(20), toy_model()
    expected = Trojan().make_trigger(clean, rng=rng(), surrogate=model).pattern
    assert torch.equal(
        Trojan().make_trigger(clean, rng=rng(), surrogate=unchanged(model.train())).pattern,
        expected,
    )
    assert (
        all(p.requires_grad and p.grad is None for p in model.parameters()) and model.bn1.training
    )


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
        ({"excitement": float("nan")}, "excitement must be above 0, got nan"),
    ],
)
def test_impossible_settings_are_refused(options, message, toy_set, toy_model, rng):
    with pytest.raises(UserError, match=message):
        Trojan(**options).make_trigger(toy_set(4), rng=rng(), surrogate=toy_model())


def test_it_needs_a_benign_model(toy_set, rng):
    with pytest.raises(UserError, match="trojan optimizes its patch on a benign model"):
        Trojan().make_trigger(toy_set(4), rng=rng())
