"""Low frequencies and nothing else, with the given amplitude, optimized on the surrogate."""

import pytest
import torch
import torch.nn.functional as F

from rnp.attacks.low_frequency import LowFrequency, cosines
from rnp.errors import UserError
from rnp.training.predict import predict


def test_the_cosines_by_hand():
    basis = cosines((3, 4, 6), 2)  # [3, h, w]: along x, along y, both
    x = (torch.pi * (torch.arange(6) + 0.5) / 6).cos()
    y = (torch.pi * (torch.arange(4) + 0.5) / 4).cos().unsqueeze(1)
    expected = torch.stack([x.expand(4, 6), y.expand(4, 6), y * x])
    assert torch.allclose(basis, expected, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 5])
def test_no_high_frequency_and_no_more_than_the_amplitude(steps, toy_set, toy_model, rng):
    attack = LowFrequency(amplitude=0.07, num_frequencies=3, steps=steps)
    pattern = attack.make_trigger(toy_set(40), rng=rng(), surrogate=toy_model()).pattern
    low = cosines((3, 8, 8), 3).flatten(1)  # [8, pixels], orthogonal
    weights = pattern.flatten(1) @ low.mT / low.square().sum(1)
    assert torch.allclose(weights @ low, pattern.flatten(1), atol=1e-6), "its projection"
    assert pattern.abs().max().item() == pytest.approx(0.07, rel=1e-5)
    assert pattern.mean((1, 2)).abs().max() < 1e-6


@pytest.mark.parametrize("label_mode, offset", [("all_to_one", None), ("all_to_all", 1)])
def test_the_steps_move_predictions_of_the_surrogate(label_mode, offset, toy_set, trained, rng):
    clean = toy_set(80)
    wanted = (clean.labels + offset) % 4 if offset else torch.ones_like(clean.labels)

    def loss(steps: int) -> float:
        attack = LowFrequency(target_label=1, label_mode=label_mode, steps=steps, amplitude=0.2)
        trigger = attack.make_trigger(clean, rng=rng(), surrogate=trained)
        return F.cross_entropy(predict(trained, trigger(clean.as_floats())), wanted).item()

    assert loss(100) < loss(0) - 0.1


def test_the_flags_of_the_surrogate_stay(toy_set, trained, unchanged, rng):
    LowFrequency(steps=3).make_trigger(toy_set(40), rng=rng(), surrogate=unchanged(trained))
    assert all(p.requires_grad and p.grad is None for p in trained.parameters())


def test_it_needs_a_surrogate(toy_set, rng):
    with pytest.raises(UserError, match="low_frequency needs a benign model; pass surrogate="):
        LowFrequency().make_trigger(toy_set(4), rng=rng())


@pytest.mark.parametrize(
    "options",
    [
        {"amplitude": 0},
        {"amplitude": 20},
        {"num_frequencies": 1},
        {"steps": -1},
        {"batch_size": 0},
        {"lr": 0},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(UserError, match=f"low_frequency.{next(iter(options))} must be"):
        LowFrequency(**options)


def test_more_cosines_than_pixels_are_refused(toy_set, toy_model, rng):
    with pytest.raises(UserError, match=r"num_frequencies must be at most 8, .*, got 9"):
        LowFrequency(num_frequencies=9).make_trigger(toy_set(4), rng=rng(), surrogate=toy_model())
