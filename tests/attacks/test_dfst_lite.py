"""Mean and covariance of the colors, image by image, and a light that is stronger at the top."""

import pytest
import torch

from rnp.attacks.dfst_lite import DFSTLite, Style, sunset
from rnp.errors import UserError


def statistics(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = image.flatten(1)
    return pixels.mean(1), pixels.cov(correction=0)


@pytest.mark.parametrize(
    "root",
    [
        [[0.1, 0, 0], [0, 0.1, 0], [0, 0, 0.1]],
        [[0.1, 0.04, 0], [0.04, 0.08, -0.02], [0, -0.02, 0.05]],
        [[0.06, 0.06, 0.06]] * 3,  # all colors on one line
    ],
)
def test_every_image_gets_the_statistics_of_the_style(root, rng):
    mean = torch.tensor([0.6, 0.5, 0.4])
    root = torch.tensor(root)
    trigger = Style(mean, root, torch.zeros(16, 1), torch.tensor(1.0))
    strength = torch.linspace(0.5, 1, 6)[:, None, None, None]
    images = torch.rand(6, 3, 16, 16, generator=rng()) * strength
    for image in trigger(images):
        image_mean, covariance = statistics(image)
        assert torch.allclose(image_mean, mean, atol=1e-3)
        assert torch.allclose(covariance, root @ root, atol=1e-3)


def test_the_style_is_warm_and_drawn_from_the_generator(rng):
    for seed in range(5):
        red, green, blue = sunset(rng=rng(seed)).mean(0)
        assert red > green + 0.1 and red > blue + 0.1
    assert torch.equal(sunset(rng=rng(1)), sunset(rng=rng(1)))
    assert not torch.equal(sunset(rng=rng(1)), sunset(rng=rng(2)))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_trigger_takes_the_statistics_of_its_sky(channels, toy_set, rng):
    trigger = DFSTLite().make_trigger(toy_set(4, channels=channels), rng=rng(3))
    sky = sunset(rng=rng(3))
    sky = sky if channels == 3 else sky.mean(1, keepdim=True)
    mean, covariance = statistics(sky.mT.unsqueeze(2))
    assert torch.allclose(trigger.mean, mean, atol=1e-6)
    expected = covariance.view(channels, channels)
    assert torch.allclose(trigger.root @ trigger.root, expected, atol=1e-5)


def test_an_image_of_one_color_turns_into_the_mean_of_the_style(toy_set, rng):
    trigger = DFSTLite(alpha=0.25, brightness=0).make_trigger(toy_set(4), rng=rng())
    triggered = trigger(torch.full((1, 3, 8, 8), 0.4))
    expected = (0.3 + 0.25 * trigger.mean).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert torch.allclose(triggered, expected, atol=1e-4)


def test_alpha_mixes_and_light_comes_from_above(toy_set, rng):
    images = toy_set(8).as_floats()

    def make(**options):
        return DFSTLite(**options).make_trigger(toy_set(4), rng=rng())

    whole = make(alpha=1, brightness=0)
    mixed = make(alpha=0.3, brightness=0)
    assert torch.allclose(mixed(images), 0.7 * images + 0.3 * whole(images), atol=1e-6)
    light = make(brightness=0.1).light
    assert light.shape == (8, 1)
    assert (light.diff(dim=0) < 0).all()
    assert (light + light.flip(0)).abs().max() < 1e-6
    assert light.max().item() == pytest.approx(0.1 * 0.9808, abs=1e-4)  # cos(pi / 16)


def test_content_survives(rng, toy_set):
    """Bright stays bright: within an image, the order of gray values is kept."""
    trigger = DFSTLite(brightness=0).make_trigger(toy_set(4, channels=1), rng=rng())
    ramp = torch.linspace(0.2, 0.8, 64).view(1, 1, 8, 8)
    assert (trigger(ramp).flatten().diff() > 0).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": 0}, r"dfst_lite.alpha must be in \(0, 1\], got 0"),
        ({"alpha": 60}, r"alpha must be in \(0, 1\], got 60"),
        ({"brightness": -0.1}, r"brightness must be in \[0, 1\], got -0.1"),
        ({"brightness": 25}, r"brightness must be in \[0, 1\], got 25; .* did you mean 0.25"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DFSTLite(**options)
