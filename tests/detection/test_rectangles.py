"""Rectangles of one color: where they lie, how they change, and that success grows."""

import pytest
import torch
from planted import CORNER, TARGET, BackdooredNet, images, rng

from rnp.detection.rectangles import (
    Rectangles,
    draw_rectangles,
    evolve_rectangles,
    success,
)


def rectangle(first, last, color=(1.0, 0.5, 0.0)):
    return Rectangles(torch.tensor([first]), torch.tensor([last]), torch.tensor([color]))


def test_what_lies_outside_of_the_region_is_cut_off():
    region = torch.zeros(4, 5, dtype=torch.bool)
    region[1:3] = True
    masks, patterns = rectangle((2, 1), (3, 2)).paint(region)
    assert masks.shape == (1, 4, 5) and masks.sum() == 2 and (masks[0, 2, 1:3] == 1).all()
    assert patterns.shape == (1, 3, 4, 5)
    assert patterns[0, :, 0, 0].tolist() == patterns[0, :, 3, 4].tolist() == [1.0, 0.5, 0.0]


def test_drawn_rectangles_lie_between_pixels_of_the_region():
    drawn = draw_rectangles(CORNER, 3, 12, rng())
    masks, patterns = drawn.paint(torch.ones_like(CORNER))
    assert masks.shape == (12, 8, 8) and (masks.amax((1, 2)) == 1).all()
    assert (masks[:, ~CORNER] == 0).all()
    assert (patterns[0::3] == 1).all() and (patterns[1::3] == 0).all()


def test_changes_are_small():
    """Half of the colors stay, a quarter is near, in a quarter all channels are dark or full."""
    one = rectangle((2, 3), (5, 6), (0.6, 0.5, 0.4)).take(torch.zeros(4000, dtype=torch.int64))
    changed = one.change(rng())
    assert (changed.first - one.first).abs().max() == (changed.last - one.last).abs().max() == 1
    same = (changed.colors == one.colors).all(1).double().mean().item()
    near = ((changed.colors - one.colors).abs() <= 0.15).all(1).double().mean().item()
    pure = ((changed.colors == 0) | (changed.colors == 1)).all(1).double().mean().item()
    assert same == pytest.approx(0.5, abs=0.03) and near == pytest.approx(0.75, abs=0.03)
    assert pure == pytest.approx(0.25, abs=0.03)
    assert changed.colors.min() >= 0 and changed.colors.max() <= 1


def test_success_is_the_mean_probability_of_the_label():
    model, clean = BackdooredNet().eval(), images().as_floats()[:6]
    masks, patterns = draw_rectangles(CORNER, 3, 40, rng()).paint(CORNER)
    found = success(TARGET, masks, patterns, model, clean)
    for i in (0, 17, 39):
        triggered = clean * (1 - masks[i]) + patterns[i] * masks[i]
        expected = model(triggered).softmax(1)[:, TARGET].mean()
        assert found[i] == pytest.approx(expected.item(), abs=1e-5)


def test_success_grows_over_the_generations():
    """The whole image is the region, of which the trigger is the corner."""
    model, clean = BackdooredNet().eval(), images().as_floats()[:8]
    region = torch.ones_like(CORNER)
    best = evolve_rectangles(TARGET, region, model, clean, count=8, generations=4, rng=rng(3))
    reached = success(TARGET, *best.paint(region), model, clean)
    assert len(best) == 5
    assert (reached.diff() >= -1e-6).all() and reached[-1] > reached[0] + 0.1
