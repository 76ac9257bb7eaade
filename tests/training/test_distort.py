"""Distortions: each kind does what it says, on the images it is meant for, repeatably."""

import pytest
import torch

from rnp.training.distort import (
    MAX_BLEND,
    blend_pattern,
    cover_rectangle,
    distort,
    random_rectangles,
    warp,
)


@pytest.fixture
def images(rng):
    return torch.rand(400, 3, 32, 24, generator=rng())


def share_changed(before, after):
    return (before != after).any(1).flatten(1).float().mean(1)


def test_a_distortion_is_repeatable_and_leaves_images_and_range_alone(images, rng):
    before = images.clone()
    distorted = distort(images, rng=rng())
    assert torch.equal(distorted, distort(images, rng=rng()))
    assert torch.equal(images, before)
    assert 0 <= distorted.min() and distorted.max() <= 1 and distorted.shape == images.shape
    assert (share_changed(images, distorted) > 0).float().mean() > 0.95


def test_all_three_kinds_occur(images, rng):
    """A third has a small rectangle; the others change nearly everywhere."""
    shares = share_changed(images, distort(images, rng=rng()))
    assert 0.25 < (shares < 0.2).float().mean() < 0.42


def test_each_image_gets_one_small_rectangle(images, rng):
    changed = share_changed(images, cover_rectangle(images, rng=rng()))
    assert 0 < changed.min() and changed.max() < 0.17


def test_rectangles_are_filled_by_one_color_black_white_or_noise(rng):
    gray = torch.full((500, 3, 32, 32), 0.5)
    covered = cover_rectangle(gray, rng=rng())
    pixels = [image[:, (image != 0.5).all(0)].T.unique(dim=0) for image in covered]
    single = torch.tensor([len(colors) == 1 for colors in pixels])
    extreme = torch.tensor([len(c) == 1 and c.sum().item() in (0, 3) for c in pixels])
    assert 0.68 < single.float().mean() < 0.82
    assert 0.18 < extreme.float().mean() < 0.32


def test_rectangles_have_the_sizes_asked_for(rng):
    inside = random_rectangles(1000, 32, 24, 0.02, 0.33, rng=rng())
    rows = inside.any(2).sum(1)
    columns = inside.any(1).sum(1)
    assert torch.equal(inside.flatten(1).sum(1), rows * columns)
    share = rows * columns / (32 * 24)
    assert 0.005 < share.min() < 0.03 and 0.28 < share.max() <= 0.33
    ratio = rows / columns
    assert ratio.max() > 2 and ratio.min() < 0.5
    assert len(inside.any(2).float().argmax(1).unique()) > 20


def test_a_blend_moves_no_pixel_by_more_than_its_weight(images, rng):
    blended = blend_pattern(images, rng=rng())
    assert 0.1 < (blended - images).abs().amax((1, 2, 3)).mean()
    assert (blended - images).abs().max() < MAX_BLEND


def test_a_warp_moves_an_edge_by_a_few_pixels_and_invents_no_values(rng):
    step = torch.zeros(200, 3, 32, 32)
    step[:, :, :, 16:] = 1
    warped = warp(step, rng=rng())
    assert (warped >= -1e-6).all() and (warped <= 1 + 1e-6).all()
    assert torch.allclose(warped[:, :, :, :11], step[:, :, :, :11], atol=1e-5)
    assert torch.allclose(warped[:, :, :, 21:], step[:, :, :, 21:], atol=1e-5)
    assert (warped != step).flatten(1).any(1).float().mean() > 0.9
