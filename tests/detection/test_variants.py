"""Other triggers in the place of a recovered one."""

import dataclasses

import pytest
import torch
from planted import TARGET, BackdooredNet, images, rng, trigger

from rnp.detection.base import RecoveredTrigger
from rnp.detection.variants import VariantSearch
from rnp.errors import UserError

SEARCH = VariantSearch(costs=(0.001, 0.01), steps=30, batch_size=8, rectangles=16, generations=1)


@pytest.fixture
def known():
    """Part of the bright corner, in gray."""
    mask = torch.zeros(8, 8)
    mask[6:, 7] = 1.0
    return RecoveredTrigger(TARGET, mask, torch.full((3, 8, 8), 0.9), 1.0, 0.0)


def test_variants_work_and_stay_in_the_region(known):
    search = dataclasses.replace(SEARCH, margin=1)
    found = search(known, BackdooredNet().eval(), images(), rng=rng())
    assert len(found) == 2 * 3 + 2 and {one.label for one in found} == {TARGET}
    assert max(one.gain for one in found) > 0.9
    region = search.region(known.mask)
    assert region.sum() == 6 and region[5:, 6:].all()
    assert all((one.mask[~region] == 0).all() for one in found)


@pytest.mark.parametrize("margin, area", [(0, 2), (1, 6), (2, 12)])
def test_the_region_is_the_mask_and_what_is_around(margin, area, known):
    faint = known.mask.clone()
    faint[0, 0] = 0.2  # below the edge
    assert VariantSearch(margin=margin).region(faint).sum() == area


def test_a_cost_makes_masks_smaller(known):
    search = VariantSearch(costs=(0.0, 1.0), steps=30, batch_size=8, rectangles=8, generations=0)
    found = search(known, BackdooredNet().eval(), images(), rng=rng())
    assert len(found) == 6 + 1
    assert max(one.l1 for one in found[3:6]) < min(one.l1 for one in found[:3])


def test_the_model_stays_as_it_is(known, unchanged):
    SEARCH(known, unchanged(BackdooredNet().eval()), images(), rng=rng())


def test_equal_generators_find_equal_variants():
    one, other = (
        SEARCH(trigger(TARGET, 5), BackdooredNet().eval(), images(), rng=rng(4)) for _ in range(2)
    )
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(one, other))
    assert all(torch.equal(a.pattern, b.pattern) for a, b in zip(one, other))


@pytest.mark.parametrize(
    "name, value", [("costs", ()), ("costs", (-1.0,)), ("edge", 1.0), ("margin", -1)]
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        VariantSearch(**{name: value})
