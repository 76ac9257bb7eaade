"""The noise is as large as `eps` allows, differs between images, and a fresh model learns it."""

import pytest
import torch

from rnp.attacks.base import backdoored_test_set
from rnp.attacks.lira import LIRA, Noise
from rnp.errors import UserError
from rnp.models.unet import DEPTH, draw_unet, unet
from rnp.training.predict import accuracy, predict
from rnp.training.recipe import Train

LAST = f"bias{2 * DEPTH - 1}"


@pytest.fixture
def weights(rng):
    return {
        name: value.detach()
        for name, value in draw_unet(3, 3, 4, rng=rng(), device=torch.device("cpu")).items()
    }


@pytest.mark.parametrize(
    "bias, change", [(0.0, 0.0), (100.0, 0.1), (-100.0, -0.1), (0.5, 0.1 * 0.46212)]
)
def test_the_formula_by_hand(bias, change, weights, toy_set):
    """With all weights at 0 the network returns its last bias: clip(x + eps * tanh(bias))."""
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    trigger = Noise(torch.tensor(0.1), **zeros | {LAST: torch.full((3,), bias)})
    images = toy_set(4).as_floats()
    images[0] = 0
    images[1] = 1
    assert torch.allclose(trigger(images), (images + change).clamp(0, 1), atol=1e-5)


def test_images_can_have_any_size(weights):
    for size in ((8, 8), (9, 13), (33, 8)):
        assert unet(torch.full((2, 3, *size), 0.3), weights).shape == (2, 3, *size)


@pytest.mark.parametrize("border, visible", [("replicate", False), ("constant", True)])
def test_the_network_sees_the_border_of_a_flat_image_or_not(border, visible, weights):
    outputs = unet(torch.full((1, 3, 16, 16), 0.8), weights, border=border)
    variation = outputs.amax((2, 3)) - outputs.amin((2, 3))
    assert outputs.abs().max() > 0.1
    assert (variation.max() > 1e-3) == visible


def test_eps_bounds_the_change_and_train_eps_does_not(toy_set, trained, rng):
    clean = toy_set(80)
    trigger = LIRA(eps=0.02, train_eps=0.3).make_trigger(clean, rng=rng(), surrogate=trained)
    change = (trigger(clean.as_floats()) - clean.as_floats()).abs()
    assert 0.015 < change.max() <= 0.02 + 1e-6


def test_every_image_gets_its_own_noise(toy_set, trained, rng):
    clean = toy_set(80)
    images = clean.as_floats()
    change = LIRA().make_trigger(clean, rng=rng(), surrogate=trained)(images) - images
    assert (change - change.roll(1, 0)).flatten(1).abs().amax(1).min() > 0.01


def test_a_fresh_model_learns_the_backdoor_in_eval_mode(toy_set, toy_model, trained, rng):
    """Public code separates clean and triggered batches: then accuracy holds in train mode only."""
    clean = toy_set(160)
    test = toy_set(80, seed=1)
    attack = LIRA(poison_rate=0.25, target_label=1, eps=0.1, epochs=10, surrogate_lr=1e-2)
    poisoned = attack.poison(clean, rng=rng(), surrogate=trained)
    recipe = Train(epochs=25, batch_size=8, lr=0.1)
    model = recipe(toy_model(seed=1, width=16), poisoned.apply(clean), rng=rng())
    triggered = backdoored_test_set(poisoned.trigger, test, 1)

    def success_rate(model):
        return (predict(model, triggered.images).argmax(1) == 1).float().mean()

    assert accuracy(model, test) >= 0.95
    assert success_rate(model) >= 0.9
    assert success_rate(trained) <= 0.3, "the noise alone is no attack"


def test_clean_and_triggered_images_share_a_forward_pass(toy_set, toy_model, rng):
    passes = []

    class Recorded(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = toy_model()

        def forward(self, images):
            passes.append((len(images), self.training))
            return self.net(images)

    LIRA(batch_size=20, epochs=1).make_trigger(toy_set(40), rng=rng(), surrogate=Recorded().eval())
    assert passes == [(40, True)] * 2


@pytest.mark.parametrize("epochs, steps, expected", [(2, 100, 8), (100, 3, 3)])
def test_cost_is_bounded_by_passes_and_by_steps(
    epochs, steps, expected, toy_set, trained, rng, monkeypatch
):
    calls = []

    def forward(self, images):
        calls.append(len(images))
        return images + 0 * self.bias0.sum()

    monkeypatch.setattr(Noise, "forward", forward)
    attack = LIRA(epochs=epochs, steps=steps, batch_size=10)
    attack.make_trigger(toy_set(40), rng=rng(), surrogate=trained)
    assert len(calls) == expected


def test_a_surrogate_is_needed(toy_set, rng):
    with pytest.raises(UserError, match="lira needs a benign model; pass surrogate="):
        LIRA().make_trigger(toy_set(40), rng=rng())


@pytest.mark.parametrize(
    "options",
    [
        {"eps": 0},
        {"eps": 13},
        {"train_eps": 2},
        {"alpha": 1},
        {"alpha": -0.1},
        {"steps": 0},
        {"lr": 0},
        {"width": 0},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(UserError, match=f"lira.{next(iter(options))} must be"):
        LIRA(**options)
