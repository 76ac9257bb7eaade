"""The exact patch in the exact corner."""

import pytest
import torch

from rnp.attacks.badnets import BadNets
from rnp.errors import UserError


def test_the_patch_is_a_checkerboard_in_the_lower_right_corner(toy_set, rng):
    clean = toy_set(4)
    trigger = BadNets().make_trigger(clean, rng=rng())
    expected = clean.as_floats()
    expected[:, :, 5:, 5:] = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1.0]])
    assert torch.equal(trigger(clean.as_floats()), expected)
    assert trigger.support.nonzero().tolist() == [[y, x] for y in (5, 6, 7) for x in (5, 6, 7)]


def test_a_margin_moves_it_inwards(toy_set, rng):
    support = BadNets(size=2, margin=3).make_trigger(toy_set(4), rng=rng()).support
    assert support.nonzero().tolist() == [[3, 3], [3, 4], [4, 3], [4, 4]]


@pytest.mark.parametrize(
    "options", [{"size": 9}, {"size": 0}, {"size": 6, "margin": 3}, {"margin": -1}]
)
def test_a_patch_that_does_not_fit_is_refused(options, toy_set, rng):
    with pytest.raises(UserError, match="does not fit 8x8 images"):
        BadNets(**options).make_trigger(toy_set(4), rng=rng())
