"""One smooth field per experiment, half of `strength` long."""

import pytest
import torch

from rnp.attacks.wanet import WaNet
from rnp.errors import UserError


def displacement(grid: torch.Tensor) -> torch.Tensor:
    """[h, w, 2]: by how many pixels (x, y) each sampling point lies off its own place."""
    height, width, _ = grid.shape
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij"
    )
    return (grid - torch.stack([x, y], 2)) * torch.tensor([width - 1, height - 1]) / 2


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_mean_displacement_is_half_the_strength_in_pixels(strength, toy_set, rng):
    grid = WaNet(strength=strength).make_trigger(toy_set(4, size=32), rng=rng()).grid
    inner = (
        displacement(grid)[2:-2, 2:-2].abs().mean((0, 1))
    )  # at the border the field is cut to the image
    assert inner.tolist() == pytest.approx([strength / 2] * 2, rel=0.06)


def test_a_coarse_control_grid_gives_a_smooth_field(toy_set, rng):
    def rough(k):
        return (
            displacement(WaNet(k=k).make_trigger(toy_set(4, size=32), rng=rng()).grid)
            .diff(dim=1)
            .abs()
            .mean()
        )

    assert rough(4) < rough(32) / 3


def test_x_moves_columns_and_y_rows(toy_set, rng):
    """A field along x alone, by hand: shift by one pixel to the left."""
    trigger = WaNet().make_trigger(toy_set(4), rng=rng())
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    trigger.grid.copy_(torch.stack([(x + 2 / 7).clamp(-1, 1), y], 2))
    images = toy_set(2).as_floats()
    assert torch.allclose(trigger(images)[..., :-1], images[..., 1:], atol=1e-5)


def test_train_and_test_share_the_field(toy_set, rng):
    """The poisoned pixels are what the returned trigger makes of the clean ones."""
    clean = toy_set(40)
    poisoned = WaNet(poison_rate=0.2).poison(clean, rng=rng())
    exact = poisoned.trigger(clean.as_floats()[poisoned.positions]) * 255
    assert (poisoned.images - exact).abs().max() <= 0.501


def test_a_control_grid_needs_two_points(toy_set, rng):
    with pytest.raises(UserError, match="k must be at least 2, got 1"):
        WaNet(k=1).make_trigger(toy_set(4), rng=rng())


@pytest.mark.parametrize("strength", [0, -1, float("nan"), float("inf")])
def test_the_strength_is_above_0_and_finite(strength):
    with pytest.raises(UserError, match=f"strength must be above 0 and finite, got {strength}"):
        WaNet(strength=strength)


def ramp(axis: int) -> torch.Tensor:
    """[300, 1, 32, 32]: gray that counts the columns (axis 3) or the rows (axis 2), in steps of
    0.03.
    """
    return (
        (0.03 * torch.arange(32).view(32, 1) if axis == 2 else 0.03 * torch.arange(32))
        .expand(300, 1, 32, 32)
        .clone()
    )


@pytest.mark.parametrize("axis", [2, 3])
def test_covers_are_warped_by_half_a_pixel_of_noise_of_their_own(axis, toy_set, rng):
    """On a ramp the change of gray is the shift in pixels."""
    attack, images = WaNet(cover_rate=0.2), ramp(axis)
    trigger = attack.make_trigger(toy_set(4, size=32), rng=rng())
    inner = (..., slice(4, -4), slice(4, -4))
    noise = ((attack.apply_cover(trigger, images, rng=rng(1)) - trigger(images)) / 0.03)[inner]
    reach = 0.5 * 31 / 32
    assert noise.abs().max().item() == pytest.approx(reach, abs=0.01), "uniform in +- half a pixel"
    assert noise.mean().abs() < 0.01 and noise.abs().mean().item() == pytest.approx(
        reach / 2, abs=0.01
    )
    assert (noise[0] - noise[1]).abs().mean() > 0.2, "every cover has its own"


def test_covers_differ_from_poisoned_images_and_keep_their_labels(toy_set, rng):
    clean = toy_set(40)
    poisoned = WaNet(poison_rate=0.2, cover_rate=0.4).poison(clean, rng=rng())
    exact = (
        (poisoned.trigger(clean.as_floats()[poisoned.positions]) * 255 - poisoned.images)
        .abs()
        .flatten(1)
    )
    assert exact[~poisoned.covers].max() <= 0.501 and exact[poisoned.covers].mean(1).min() > 2
    assert torch.equal(
        poisoned.labels[poisoned.covers], clean.labels[poisoned.positions][poisoned.covers]
    )
