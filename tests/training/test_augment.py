"""Random crops and flips, compared with a slow loop."""

import pytest
import torch

from rnp.errors import UserError
from rnp.training.augment import Augment, shrink


def slowly(images: torch.Tensor, crop: int, flip: bool, rng: torch.Generator) -> torch.Tensor:
    """Pixel by pixel: crop from the zero-padded image, then mirror."""
    n, _c, h, w = images.shape
    dy, dx = torch.randint(-crop, crop + 1, (2, n), generator=rng).tolist()
    mirrored = (torch.rand(n, generator=rng) < 0.5).tolist() if flip else [False] * n
    out = torch.zeros_like(images)
    for i in range(n):
        for y in range(h):
            for x in range(w):
                row, column = y + dy[i], (w - 1 - x if mirrored[i] else x) + dx[i]
                if 0 <= row < h and 0 <= column < w:
                    out[i, :, y, x] = images[i, :, row, column]
    return out


@pytest.mark.parametrize("crop, flip", [(0, False), (0, True), (2, False), (2, True), (9, True)])
@pytest.mark.parametrize("shape", [(6, 3, 5, 5), (3, 1, 4, 6)])
def test_equals_the_slow_loop(crop, flip, shape, rng):
    images = torch.rand(shape, generator=rng(1))
    before = images.clone()
    assert torch.equal(
        Augment(crop=crop, flip=flip)(images, rng=rng()), slowly(images, crop, flip, rng())
    )
    assert torch.equal(images, before)


def test_nothing_to_do_changes_nothing(rng):
    images = torch.rand(4, 3, 5, 5, generator=rng())
    assert torch.equal(Augment(crop=0, flip=False)(images, rng=rng()), images)


def test_every_image_has_its_own_draw(rng):
    images = torch.rand(1, 3, 8, 8, generator=rng()).expand(200, -1, -1, -1)
    out = Augment(crop=1)(images, rng=rng())
    assert len({image.numpy().tobytes() for image in out}) == 18  # 3 x 3 shifts, mirrored or not


def test_a_negative_crop_is_refused():
    with pytest.raises(UserError, match=r"augment\.crop must be 0 or more, got -1"):
        Augment(crop=-1)


@pytest.mark.parametrize(
    "scale, sides",
    [(1.0, (12, 20)), (0.99, (8, 16)), (0.5, (4, 8)), (2 / 3, (8, 12)), (0.01, (4, 4))],
)
def test_smaller_images(scale, sides):
    """Sides are multiples of four; where nothing changes the images are the same object."""
    images = torch.full((2, 3, 12, 20), 0.25)
    small = shrink(images, scale)
    assert small.shape == (2, 3, *sides) and torch.allclose(small, torch.tensor(0.25))
    assert (small is images) == (sides == (12, 20))


def test_a_side_below_four_stays():
    assert shrink(torch.rand(1, 1, 3, 6), 0.9).shape == (1, 1, 3, 4)


def test_neighbors_are_averaged():
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(1, 1, 8, 8)
    assert torch.allclose(shrink(stripes, 0.5)[..., 1:3], torch.tensor(0.5), atol=1e-6)
