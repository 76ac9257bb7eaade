"""A trigger is small and depends on its image; a cover carries the trigger of another image."""

import pytest
import torch

from rnp.attacks.input_aware import (
    InputAware,
    InputAwareTrigger,
    compose,
    cross_triggered,
    distance,
)
from rnp.errors import UserError
from rnp.models.unet import DEPTH, draw_unet

LAST = f"bias{2 * DEPTH - 1}"


class CopyTrigger(InputAwareTrigger):
    """A trigger that is the whole image: a cross-triggered image is a copy of another one."""

    def mask(self, images):
        return torch.ones_like(images[:, :1])

    def pattern(self, images):
        return images


def test_compose_by_hand():
    image = torch.full((1, 3, 2, 2), 0.2)
    pattern = torch.full((1, 3, 2, 2), 0.8)
    mask = torch.tensor([[0.0, 1.0], [0.5, 0.0]]).view(1, 1, 2, 2)
    expected = torch.tensor([[0.2, 0.8], [0.5, 0.2]]).expand(1, 3, 2, 2)
    assert torch.allclose(compose(pattern, mask, image), expected)


@pytest.mark.parametrize(
    "mask, pattern, share, color",
    [(9, 99, 1, 1), (9, -99, 1, 0), (-9, 99, 0, 1), (0, 99, 0.5, 1), (0, 0, 0.5, 0.5)],
)
def test_the_two_networks_have_their_parts(mask, pattern, share, color, rng, toy_set):
    """With all weights at 0 each network returns the sigmoid of its last bias."""
    cpu = torch.device("cpu")
    images = toy_set(4).as_floats()
    weights = draw_unet(3, 1, 4, rng=rng(), device=cpu, prefix="mask_")
    weights |= draw_unet(3, 3, 4, rng=rng(), device=cpu, prefix="pattern_")
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    zeros[f"mask_{LAST}"] += mask
    zeros[f"pattern_{LAST}"] += pattern
    expected = (1 - share) * images + share * color
    assert torch.allclose(InputAwareTrigger(**zeros)(images), expected, atol=2e-4)


@pytest.mark.parametrize("n", [2, 3, 10, 101])
def test_a_cross_trigger_comes_from_another_image(n, toy_set, rng):
    images = toy_set(n).as_floats()
    crossed = cross_triggered(CopyTrigger(), images, rng=rng())
    sources = torch.cdist(crossed.flatten(1), images.flatten(1)).argmin(1).tolist()
    assert sorted(sources) == list(range(n))
    assert all(source != image for image, source in enumerate(sources))


def test_a_cross_trigger_is_drawn_anew(toy_set, rng):
    images = toy_set(20).as_floats()
    seed_1, again, seed_2 = (
        cross_triggered(CopyTrigger(), images, rng=rng(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(seed_1, again)
    assert not torch.equal(seed_1, seed_2)


def test_a_single_image_stays_clean(toy_set, rng):
    image = toy_set(1).as_floats()
    assert torch.equal(cross_triggered(CopyTrigger(), image, rng=rng()), image)


def test_distance_by_hand():
    batch = torch.tensor([0.0, 0.3, 1.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    assert distance(batch).tolist() == pytest.approx([1.0, 0.3, 0.7], abs=1e-4)
    alone = torch.rand(1, 3, 4, 4, requires_grad=True)
    distance(alone).sum().backward()
    assert alone.grad.isfinite().all(), "the root has no gradient at 0"


@pytest.fixture(scope="module")
def learned(toy_set, toy_model, rng):
    """A trigger whose networks had 120 steps each."""
    return InputAware(epochs=30, batch_size=25, width=8, lr=5e-3).make_trigger(
        toy_set(100), rng=rng(), surrogate=toy_model()
    )


def test_masks_keep_to_the_density(learned, toy_set):
    mask = learned.mask(toy_set(100).as_floats())
    assert 0.01 < mask.mean() < 0.08, "the density is .032; an untrained mask has .5"
    assert ((mask < 0.1) | (mask > 0.9)).float().mean() > 0.8, "a pixel is covered or it is not"


def test_masks_and_patterns_are_the_images_own(learned, toy_set):
    images = toy_set(100).as_floats()
    assert (
        distance(learned.mask(images)).min() > 0.01 and distance(learned.mask(images)).mean() > 0.1
    )
    assert distance(learned.pattern(images)).mean() > 0.3


def test_covers_carry_the_trigger_of_another(toy_set, trained, rng):
    """Poisoned images carry their own trigger, as at test."""
    clean = toy_set(80)
    attack = InputAware(poison_rate=0.1, cover_rate=0.2, epochs=2)
    poisoned = attack.poison(clean, rng=rng(), surrogate=trained)
    covers = poisoned.covers
    with_own_trigger = poisoned.trigger(clean.as_floats()[poisoned.positions]) * 255
    gap = (poisoned.images - with_own_trigger).abs().flatten(1).amax(1)
    assert gap[~covers].max() <= 0.501
    assert gap[covers].min() > 1
    assert torch.equal(poisoned.labels[covers], clean.labels[poisoned.positions[covers]])


def test_a_surrogate_is_needed(toy_set, rng):
    with pytest.raises(UserError, match="input_aware needs a benign model; pass surrogate="):
        InputAware().make_trigger(toy_set(40), rng=rng())


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0},
        {"density": 3.2},
        {"norm": -1},
        {"mask_diversity": -1},
        {"pattern_diversity": -1},
        {"steps": 0},
        {"lr": 0},
        {"epochs": 0},
    ],
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(UserError, match=f"input_aware.{next(iter(options))} must be"):
        InputAware(**options)
