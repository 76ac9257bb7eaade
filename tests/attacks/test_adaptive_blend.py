"""Every training image shows its own half of the pattern, the test all of it."""

import pytest
import torch

from rnp.attacks.adaptive_blend import AdaptiveBlend
from rnp.errors import UserError


def visible_cells(attack, clean, rng) -> torch.Tensor:
    """[n, grid, grid]: which cells of the pattern an image carries; each must be all or nothing."""
    trigger = attack.make_trigger(clean, rng=rng)
    trigger.pattern.fill_(1)
    black = torch.zeros(len(clean), *clean.shape)
    triggered = attack.apply_trigger(trigger, black, rng=rng) / attack.train_alpha
    side = clean.shape[1] // attack.grid_size
    cells = triggered[:, 0].unfold(1, side, side).unfold(2, side, side).flatten(3)
    assert torch.equal(triggered[:, 0], triggered[:, 2]), "the same in all channels"
    assert (cells == cells[..., :1]).all()
    assert torch.allclose(cells.square(), cells)
    return cells[..., 0].round().bool()


@pytest.mark.parametrize(
    "grid, fraction, count", [(4, 0.5, 8), (4, 0.25, 4), (2, 0.5, 2), (1, 1.0, 1)]
)
def test_a_fraction_of_the_cells_is_visible(grid, fraction, count, toy_set, rng):
    attack = AdaptiveBlend(grid_size=grid, visible_fraction=fraction)
    cells = visible_cells(attack, toy_set(200), rng())
    assert cells.sum((1, 2)).tolist() == [count] * 200
    assert cells.float().mean(0).sub(fraction).abs().max() < 0.15, "every cell is as likely"


def test_every_image_has_its_own_cells(toy_set, rng):
    cells = visible_cells(AdaptiveBlend(), toy_set(50), rng())
    assert len(set(map(tuple, cells.flatten(1).tolist()))) > 40


def test_the_whole_pattern_at_test(toy_set, rng):
    clean = toy_set(4)
    trigger = AdaptiveBlend(alpha=0.3).make_trigger(clean, rng=rng())
    images = clean.as_floats()
    assert torch.allclose(trigger(images), 0.7 * images + 0.3 * trigger.pattern, atol=1e-6)


def test_covers_carry_cells_too(toy_set, rng):
    clean = toy_set(200)
    poisoned = AdaptiveBlend(poison_rate=0.05, cover_rate=0.1).poison(clean, rng=rng())
    changed = (poisoned.images != clean.images[poisoned.positions]).flatten(1).float().mean(1)
    assert poisoned.covers.sum() == 20
    assert 0.3 < changed.min() and changed.max() <= 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"visible_fraction": 0}, r"visible_fraction must be in \(0, 1\], got 0"),
        ({"alpha": 2}, r"adaptive_blend.alpha must be in \(0, 1\], got 2; .* did you mean 0.02"),
        ({"train_alpha": -1}, r"train_alpha must be in \(0, 1\], got -1"),
        ({"grid_size": 0}, "grid_size must be at least 1, got 0"),
        ({"poison_rate": 2}, r"adaptive_blend.poison_rate must be in \(0, 1\], got 2"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AdaptiveBlend(**options)


def test_a_fraction_that_rounds_to_no_cell_is_refused():
    with pytest.raises(UserError, match="rounds to none; raise visible_fraction or grid_size"):
        AdaptiveBlend(grid_size=2, visible_fraction=0.1)
