"""One patch per image, in all corners alike; drawn in training, by the image's pixels at test."""

import pytest
import torch

from rnp.attacks.multi import Multi
from rnp.errors import UserError


def corners(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """[n, 4]: whether each 3x3 corner of an 8x8 image changed, row by row; no other pixel may."""
    changed = (before != after).any(1).float()
    ends = (slice(3), slice(5, 8))
    counts = torch.stack([changed[:, y, x].sum((1, 2)) for y in ends for x in ends], 1)
    assert torch.equal(counts.sum(1), changed.sum((1, 2)))
    assert set(counts.flatten().tolist()) == {0, 9}, "a patch is whole or absent"
    return counts > 0


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_at_test_each_image_has_one_patch_and_each_patch_its_share(count, gray, toy_set, rng):
    trigger = Multi(count=count).make_trigger(toy_set(4), rng=rng())
    # neither black nor white
    levels = torch.randint(1, 255, (2000, 1 if gray else 3, 8, 8), generator=rng())
    images = (levels / 255).expand(-1, 3, -1, -1)
    patched = corners(images, trigger(images))
    assert (patched.sum(1) == 1).all()
    shares = patched.float().mean(0)
    assert (shares > 0).sum() == count
    assert (shares[shares > 0] - 1 / count).abs().max() < 0.05


def test_in_training_the_generator_decides(toy_set, rng):
    attack = Multi()
    images = toy_set(400).as_floats()
    trigger = attack.make_trigger(toy_set(4), rng=rng())
    seed_1, seed_2 = (
        corners(images, attack.apply_trigger(trigger, images, rng=rng(seed))) for seed in (1, 2)
    )
    assert (seed_1.sum(1) == 1).all()
    assert (seed_1.float().mean(0) - 0.25).abs().max() < 0.08
    assert 0.1 < (seed_1 == seed_2).all(1).float().mean() < 0.4, "the pixels do not"


def test_patches_are_half_white_and_the_same_in_all_channels(toy_set, rng):
    trigger = Multi().make_trigger(toy_set(4), rng=rng())
    gray = torch.full((4, 3, 8, 8), 0.5)
    triggered = trigger.place(gray, torch.arange(4))
    assert corners(gray, triggered).sum(0).tolist() == [1] * 4
    for value, count in ((0, 4), (1, 5)):
        assert (triggered == value).sum((2, 3)).tolist() == [[count] * 3] * 4
    assert (triggered == triggered[:, :1]).all()
    assert trigger.support.sum() == 36


@pytest.mark.parametrize("count", [1, 5])
def test_one_trigger_per_corner(count):
    with pytest.raises(UserError, match=f"multi.count must be from 2 to 4, got {count}"):
        Multi(count=count)


@pytest.mark.parametrize("size", [0, 5])
def test_patches_that_do_not_fit_are_refused(size, toy_set, rng):
    with pytest.raises(UserError, match=f"size {size} do not fit 8x8 images"):
        Multi(size=size).make_trigger(toy_set(4), rng=rng())
