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
    assert torch.allclose(
        trigger(images), (1 - alpha) * images + alpha * trigger.pattern, atol=1e-6
    )
    assert trigger.pattern.shape == (3, 8, 8) and trigger.support is None


@pytest.mark.parametrize("pattern", ["noise", "waves"])
def test_the_pattern_is_drawn_from_the_generator_and_fills_the_range(pattern, toy_set, rng):
    def draw(seed):
        return Blend(pattern=pattern).make_trigger(toy_set(4, size=32), rng=rng(seed)).pattern

    one = draw(1)
    assert torch.equal(one, draw(1)) and not torch.equal(one, draw(2))
    assert one.min() >= 0 and one.max() <= 1 and one.max() - one.min() > 0.9
    assert not torch.equal(one[0], one[1]), "the pattern is in color"


def test_waves_are_smooth_and_periodic(rng):
    image = waves((3, 32, 32), rng=rng())
    neighbors = (image - image.roll(1, 2)).abs()
    assert neighbors.mean() < 0.2 and neighbors[:, :, 0].mean() < 0.3


@pytest.mark.parametrize("alpha", [0, -0.2, 20])
def test_alpha_is_a_fraction(alpha):
    with pytest.raises(UserError, match=r"alpha must be in \(0, 1\]"):
        Blend(alpha=alpha)
