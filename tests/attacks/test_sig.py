"""The wave of Barni et al., eq. 1, added without wrapping, to images of the target class only."""

import math

import pytest
import torch

from rnp.attacks.base import trigger_images
from rnp.attacks.sig import SIG
from rnp.errors import UserError


def test_the_wave_by_hand(toy_set, rng):
    pattern = SIG(amplitude=0.1, frequency=6).make_trigger(toy_set(4, size=32), rng=rng()).pattern
    for column in (0, 1, 5, 31):
        expected = 0.1 * math.sin(2 * math.pi * column * 6 / 32)
        assert torch.allclose(pattern[:, :, column], torch.full((3, 32), expected), atol=1e-6)


@pytest.mark.parametrize(
    "byte, low, high", [(255, 215, 255), (250, 210, 255), (0, 0, 40), (128, 88, 168)]
)
def test_bright_pixels_do_not_wrap_and_dark_ones_neither(byte, low, high, toy_set, rng):
    trigger = SIG().make_trigger(toy_set(4, size=32), rng=rng())
    pixels = trigger_images(trigger, torch.full((1, 3, 32, 32), byte, dtype=torch.uint8))
    assert low <= pixels.min() < pixels.max() <= high


def test_only_the_target_class_is_poisoned_and_keeps_its_label(toy_set, rng):
    clean = toy_set(40)
    poisoned = SIG(poison_rate=0.2, target_label=1).poison(clean, rng=rng())
    assert clean.labels[poisoned.positions].tolist() == [1] * 8 == poisoned.labels.tolist()


def test_at_most_80_percent_of_the_class(toy_set, rng):
    message = r"asks for 10 images of class 0, which has 10; .* poison_rate 0.2$"
    with pytest.raises(UserError, match=message):
        SIG(poison_rate=0.25).poison(toy_set(40), rng=rng())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"amplitude": 40}, r"sig.amplitude must be in \(0, 1\], got 40"),
        ({"frequency": 0}, "sig.frequency must be above 0, got 0"),
        ({"poison_rate": 5}, r"sig.poison_rate must be in \(0, 1\], got 5; .* did you mean 0.05"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        SIG(**options)
