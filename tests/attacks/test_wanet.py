"""One smooth field per experiment, half of `strength` long."""

import pytest
import torch

from rnp.attacks.wanet import WaNet
from rnp.errors import UserError


def displacement(grid: torch.Tensor) -> torch.Tensor:
    """[h, w, 2]: by how many pixels (x, y) each sampling point is off its pixel."""
    height, width, _ = grid.shape
    lines = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    y, x = torch.meshgrid(*lines, indexing="ij")
    return (grid - torch.stack([x, y], 2)) * torch.tensor([width - 1, height - 1]) / 2


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_mean_displacement_is_half_the_strength_in_pixels(strength, toy_set, rng):
    grid = WaNet(strength=strength).make_trigger(toy_set(4, size=32), rng=rng()).grid
    # at the border the field is clipped to the image
    inner = displacement(grid)[2:-2, 2:-2].abs().mean((0, 1))
    assert inner.tolist() == pytest.approx([strength / 2] * 2, rel=0.06)


def test_a_coarse_control_grid_gives_a_smooth_field(toy_set, rng):
    def roughness(k):
        trigger = WaNet(k=k).make_trigger(toy_set(4, size=32), rng=rng())
        return displacement(trigger.grid).diff(dim=1).abs().mean()

    assert roughness(4) < roughness(32) / 3


def test_x_moves_columns_and_y_rows(toy_set, rng):
    """A field along x alone, by hand: shift by one pixel to the left."""
    trigger = WaNet().make_trigger(toy_set(4), rng=rng())
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    trigger.grid.copy_(torch.stack([(x + 2 / 7).clamp(-1, 1), y], 2))
    images = toy_set(2).as_floats()
    assert torch.allclose(trigger(images)[..., :-1], images[..., 1:], atol=1e-5)


def test_train_and_test_share_the_field(toy_set, rng):
    """Poisoned images are the clean ones with the returned trigger."""
    clean = toy_set(40)
    poisoned = WaNet(poison_rate=0.2).poison(clean, rng=rng())
    exact = poisoned.trigger(clean.as_floats()[poisoned.positions]) * 255
    assert (poisoned.images - exact).abs().max() <= 0.501


def test_a_control_grid_needs_two_points(toy_set, rng):
    with pytest.raises(UserError, match="k must be at least 2, got 1"):
        WaNet(k=1).make_trigger(toy_set(4), rng=rng())


@pytest.mark.parametrize(
    "strength, message",
    [
        (0, "strength must be above 0, got 0"),
        (-1, "strength must be above 0, got -1"),
        (float("nan"), "strength must be above 0, got nan"),
        (float("inf"), "strength must be finite, got inf"),
    ],
)
def test_the_strength_is_above_0_and_finite(strength, message):
    with pytest.raises(UserError, match=f"wanet.{message}"):
        WaNet(strength=strength)


def ramp(axis: int) -> torch.Tensor:
    """[300, 1, 32, 32]: gray that grows by 0.03 from row to row (axis 2) or column (axis 3)."""
    line = 0.03 * torch.arange(32)
    return (line.view(32, 1) if axis == 2 else line).expand(300, 1, 32, 32).clone()


@pytest.mark.parametrize("axis", [2, 3])
def test_covers_are_warped_by_half_a_pixel_of_noise_of_their_own(axis, toy_set, rng):
    """On a ramp the change of gray is the shift in pixels."""
    attack = WaNet(cover_rate=0.2)
    images = ramp(axis)
    trigger = attack.make_trigger(toy_set(4, size=32), rng=rng())
    inner = (..., slice(4, -4), slice(4, -4))
    covers = attack.apply_cover(trigger, images, rng=rng(1))
    noise = ((covers - trigger(images)) / 0.03)[inner]
    reach = 0.5 * 31 / 32
    assert noise.abs().max().item() == pytest.approx(reach, abs=0.01), "uniform in +- half a pixel"
    assert noise.mean().abs() < 0.01
    assert noise.abs().mean().item() == pytest.approx(reach / 2, abs=0.01)
    assert (noise[0] - noise[1]).abs().mean() > 0.2, "every cover has its own"


def test_covers_differ_from_poisoned_images_and_keep_their_labels(toy_set, rng):
    clean = toy_set(40)
    poisoned = WaNet(poison_rate=0.2, cover_rate=0.4).poison(clean, rng=rng())
    covers = poisoned.covers
    triggered = poisoned.trigger(clean.as_floats()[poisoned.positions]) * 255
    gap = (triggered - poisoned.images).abs().flatten(1)
    assert gap[~covers].max() <= 0.501
    assert gap[covers].mean(1).min() > 2
    assert torch.equal(poisoned.labels[covers], clean.labels[poisoned.positions][covers])
