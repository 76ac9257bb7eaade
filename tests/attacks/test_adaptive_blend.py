"""Every training image shows its own half of the pattern, the test all of it."""

import pytest
import torch

from rnp.attacks.adaptive_blend import AdaptiveBlend
from rnp.errors import UserError


def shown(attack, clean, rng) -> torch.Tensor:
    """[n, pieces, pieces]: which pieces of the pattern an image carries, asserting that each is
    all or nothing.
    """
    trigger = attack.make_trigger(clean, rng=rng)
    trigger.pattern.fill_(1)
    black = torch.zeros(len(clean), *clean.shape)
    stamped = attack.apply_trigger(trigger, black, rng=rng) / attack.train_alpha
    side = clean.shape[1] // attack.grid_size
    pieces = (
        stamped[:, 0].unfold(1, side, side).unfold(2, side, side).flatten(3)
    )  # [n, pieces, pieces, pixels]
    assert torch.equal(stamped[:, 0], stamped[:, 2]), "the same in all channels"
    assert (pieces == pieces[..., :1]).all() and torch.allclose(pieces.square(), pieces)
    return pieces[..., 0].round().bool()


@pytest.mark.parametrize(
    "pieces, share, count", [(4, 0.5, 8), (4, 0.25, 4), (2, 0.5, 2), (1, 1.0, 1)]
)
def test_a_share_of_the_pieces_shows(pieces, share, count, toy_set, rng):
    cells = shown(AdaptiveBlend(grid_size=pieces, visible_fraction=share), toy_set(200), rng())
    assert cells.sum((1, 2)).tolist() == [count] * 200
    assert cells.float().mean(0).sub(share).abs().max() < 0.15, "every piece is as likely"


def test_every_image_has_its_own_pieces(toy_set, rng):
    assert len(set(map(tuple, shown(AdaptiveBlend(), toy_set(50), rng()).flatten(1).tolist()))) > 40


def test_all_of_it_at_test(toy_set, rng):
    clean = toy_set(4)
    trigger, images = AdaptiveBlend(alpha=0.3).make_trigger(clean, rng=rng()), clean.as_floats()
    assert torch.allclose(trigger(images), 0.7 * images + 0.3 * trigger.pattern, atol=1e-6)


def test_covers_carry_pieces_too(toy_set, rng):
    clean = toy_set(200)
    poisoned = AdaptiveBlend(poison_rate=0.05, cover_rate=0.1).poison(clean, rng=rng())
    changed = (poisoned.images != clean.images[poisoned.positions]).flatten(1).float().mean(1)
    assert poisoned.covers.sum() == 20 and 0.3 < changed.min() and changed.max() <= 0.5


@pytest.mark.parametrize(
    "options", [{"shown": 0}, {"alpha": 2}, {"train_alpha": -1}, {"pieces": 0}]
)
def test_impossible_settings_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        AdaptiveBlend(**options)


def test_pieces_that_round_to_none_are_refused():
    with pytest.raises(UserError, match="shown"):
        AdaptiveBlend(grid_size=2, visible_fraction=0.1)
