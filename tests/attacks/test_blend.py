"""(1 - alpha) * image + alpha * pattern, and nothing else."""

import pytest
import torch

from rnp.attacks.base import waves
from rnp.attacks.blend import Blend
from rnp.errors import UserError


@pytest.mark.parametrize("pattern", ["noise", "waves"])
@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_closed_form(pattern, alpha, toy_set, rng):
    clean = toy_set(4)
    trigger = Blend(alpha=alpha, pattern=pattern).make_trigger(clean, rng=rng())
    images = clean.as_floats()
    expected = (1 - alpha) * images + alpha * trigger.pattern
    assert torch.allclose(trigger(images), expected, atol=1e-6)
    assert trigger.pattern.shape == (3, 8, 8)
    assert trigger.support is None


@pytest.mark.parametrize("pattern", ["noise", "waves"])
def test_the_pattern_is_drawn_from_the_generator_and_fills_the_range(pattern, toy_set, rng):
    def draw(seed):
        return Blend(pattern=pattern).make_trigger(toy_set(4, size=32), rng=rng(seed)).pattern

    pattern_1 = draw(1)
    assert torch.equal(pattern_1, draw(1))
    assert not torch.equal(pattern_1, draw(2))
    assert pattern_1.min() >= 0
    assert pattern_1.max() <= 1
    assert pattern_1.max() - pattern_1.min() > 0.9
    assert not torch.equal(pattern_1[0], pattern_1[1]), "the pattern is in color"


def test_waves_are_smooth_and_periodic(rng):
    image = waves((3, 32, 32), rng=rng())
    neighbors = (image - image.roll(1, 2)).abs()
    assert neighbors.mean() < 0.2
    assert neighbors[:, :, 0].mean() < 0.3, "across the border"


@pytest.mark.parametrize("alpha", [0, -0.2, 20])
def test_alpha_is_a_fraction(alpha):
    with pytest.raises(UserError, match=r"alpha must be in \(0, 1\]"):
        Blend(alpha=alpha)
