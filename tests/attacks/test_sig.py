"""The wave of Barni et al., eq. 1, added without wrapping, on images of the target class alone."""

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
def test_bright_pixels_stay_bright_and_dark_ones_dark(byte, low, high, toy_set, rng):
    trigger = SIG().make_trigger(toy_set(4, size=32), rng=rng())
    pixels = trigger_images(trigger, torch.full((1, 3, 32, 32), byte, dtype=torch.uint8))
    assert low <= pixels.min() and pixels.max() <= high and pixels.min() < pixels.max()


def test_only_the_target_class_is_poisoned_and_keeps_its_label(toy_set, rng):
    clean = toy_set(40)
    poisoned = SIG(poison_rate=0.2, target_label=1).poison(clean, rng=rng())
    assert clean.labels[poisoned.positions].tolist() == [1] * 8 == poisoned.labels.tolist()


def test_at_most_80_percent_of_the_class(toy_set, rng):
    with pytest.raises(
        UserError, match=r"asks for 10 images of class 0, which has 10; .* poison_rate 0.2$"
    ):
        SIG(poison_rate=0.25).poison(toy_set(40), rng=rng())
