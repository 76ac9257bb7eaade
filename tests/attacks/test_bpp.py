"""Floyd and Steinberg's dithering, image by image and pixel by pixel."""

import pytest
import torch

from rnp.attacks.bpp import Bpp
from rnp.errors import UserError


def dithered(image: torch.Tensor, levels: int) -> torch.Tensor:
    """One channel [h, w], dithered pixel by pixel."""
    height, width = image.shape
    rows = image.double().tolist()
    for y in range(height):
        for x in range(width):
            wanted = rows[y][x]
            rows[y][x] = round(wanted * (levels - 1)) / (levels - 1)
            error = wanted - rows[y][x]
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if y + down < height and 0 <= x + right < width:
                    rows[y + down][x + right] += error * share / 16
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", [1, 3, 5])
def test_parity_with_the_loop(bits, toy_set, rng):
    images = torch.rand(2, 3, 9, 12, generator=rng())
    expected = torch.stack(
        [torch.stack([dithered(channel, 2**bits) for channel in image]) for image in images]
    )
    trigger = Bpp(bits=bits).make_trigger(toy_set(1), rng=rng())
    assert torch.allclose(trigger(images), expected.float(), atol=1e-6)


def test_the_first_pixels_by_hand(toy_set, rng):
    """Black or white: 0.6 becomes 1; with 7/16 of the error -0.4 the next is 0.425, so black."""
    triggered = Bpp(bits=1).make_trigger(toy_set(1), rng=rng())(torch.full((1, 1, 1, 3), 0.6))
    assert triggered.flatten().tolist() == [1, 0, 1]


def test_few_levels_remain_and_the_brightness_too(toy_set, rng):
    trigger = Bpp().make_trigger(toy_set(1), rng=rng())
    images = torch.rand(4, 3, 1, 1, generator=rng()).expand(4, 3, 32, 32)
    triggered = trigger(images)
    levels = triggered * 7
    assert torch.allclose(levels, levels.round(), atol=1e-5)
    # rounding alone is off by up to 0.07
    assert (triggered.mean((2, 3)) - images.mean((2, 3))).abs().max() < 0.01
    assert torch.allclose(trigger(triggered), triggered, atol=1e-5), "these levels stay"


def test_covers_carry_the_noise_of_the_next_image(toy_set, rng):
    attack = Bpp()
    images = 0.2 + 0.6 * torch.rand(5, 3, 8, 8, generator=rng())
    trigger = attack.make_trigger(toy_set(1), rng=rng())
    noise = attack.apply_cover(trigger, images, rng=rng()) - images
    assert torch.allclose(noise, (trigger(images) - images)[[4, 0, 1, 2, 3]], atol=1e-6)


@pytest.mark.parametrize("bits", [0, 8])
def test_bits_that_remain(bits):
    with pytest.raises(UserError, match=f"bpp.bits must be from 1 to 7, got {bits}"):
        Bpp(bits=bits)
