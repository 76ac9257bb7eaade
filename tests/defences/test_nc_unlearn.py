"""Unlearning of recovered triggers, on a classifier in which a bright corner sends every image to class 3."""

import dataclasses

import pytest
import torch
from detection.planted import CORNER, TARGET, Planted, images

from rnp.augment import Augment
from rnp.defences.nc_unlearn import NCUnlearn
from rnp.errors import UserError
from rnp.training import accuracy, predict
from rnp.types import DefenceSet

METHOD = NCUnlearn(search_steps=300, steps=60, lr=3.0, batch_size=20, weight_decay=0, precision="fp32",
                   augment=Augment(crop=0, flip=False))


@pytest.fixture
def defence_set():
    return DefenceSet(images(60), images(12, seed=1))


@pytest.fixture
def found(defence_set, rng):
    """A model and its masks and patterns, of the training images."""
    model = Planted()
    return model, *METHOD.triggers(model, defence_set.train, rng())


def test_the_planted_corner_is_found_and_its_label_named(found, defence_set):
    model, masks, patterns = found
    sizes = METHOD.sizes(model, defence_set.train, masks, patterns)
    assert METHOD.suspicious(sizes).tolist() == [TARGET]
    inside = masks[TARGET, 0][CORNER]
    assert inside.sum() > 0.8 * masks[TARGET].sum() and patterns[TARGET][:, CORNER].min() > 0.5
    assert not any(value.requires_grad for value in (masks, patterns))


def test_the_trigger_found_is_unlearned(defence_set, rng):
    """The smallest mask makes the corner half as bright as the attacker does, so that is what is unlearned."""
    model, rows = Planted(), []
    model.bias.requires_grad_(False)  # else that alone would do
    method = dataclasses.replace(METHOD, steps=150, stamped=0.5)
    repaired = method.repair(model, defence_set, rng=rng(), on_epoch=rows.append).model
    test = images(60, seed=2)
    faint = test.images.clone()
    faint[:, :, CORNER] = 128

    def success(network):
        return (predict(network, faint).argmax(1) == TARGET)[test.labels != TARGET].float().mean().item()

    assert success(model) == 1 and success(repaired) < 0.1 and accuracy(repaired, test) == 1 and rows[-1].step == 150


def test_a_model_without_a_suspicious_label_stays_as_it_is(defence_set, rng):
    model, rows = Planted(corner=0.0), []
    repaired = METHOD.repair(model, defence_set, rng=rng(), on_epoch=rows.append).model
    assert repaired is not model and rows == []
    assert (repaired.corner, repaired.bias) == (model.corner, model.bias)


def test_a_trigger_that_moves_few_images_counts_as_the_whole_image(found, defence_set):
    model, masks, patterns = found
    sizes = METHOD.sizes(model, defence_set.train, torch.zeros_like(masks), patterns)
    assert sizes.tolist() == [64] * len(masks)
    full = METHOD.sizes(model, defence_set.train, torch.ones_like(masks), patterns)
    assert full[TARGET] == 64
    sizes = METHOD.sizes(model, defence_set.train, masks, patterns)
    assert sizes[TARGET].item() == pytest.approx(masks[TARGET].sum().item(), rel=1e-5)


def test_sizes_are_judged_in_logarithms():
    """Logarithms 0, 3, 4, 5, 9: median 4, deviations 4, 1, 0, 1, 5, their median 1; 4 / 1.4826 = 2.7 below, the 9 above."""
    sizes = torch.tensor([3.0, 0.0, 4.0, 9.0, 5.0]).exp()
    assert NCUnlearn().suspicious(sizes).tolist() == [1]
    assert NCUnlearn(least_index=2.69).suspicious(sizes).tolist() == [1]
    assert NCUnlearn(least_index=2.71).suspicious(sizes).tolist() == []


def test_every_flagged_label_is_stamped(found, defence_set, rng, monkeypatch):
    """Two labels flagged, all images stamped with the colour of one of them: the model sees both colours and no other."""
    model, masks, patterns = found
    colours = torch.linspace(0, 1, len(masks))[:, None, None, None].expand_as(patterns)
    monkeypatch.setattr(NCUnlearn, "triggers", lambda *_: (torch.ones_like(masks), colours))
    monkeypatch.setattr(NCUnlearn, "suspicious", lambda *_: torch.tensor([1, 4]))
    seen = set()
    monkeypatch.setattr(Planted, "forward", record(Planted.forward, seen))
    dataclasses.replace(METHOD, stamped=1.0, steps=3).repair(model, defence_set, rng=rng())
    assert seen == {0.2, 0.8}


def record(forward, seen):
    def listen(self, x):
        if self.training:
            seen.update(round(value, 3) for value in x.flatten().tolist())
        return forward(self, x)

    return listen


POSITIVE = ("search_steps", "search_batch", "search_lr", "init_cost", "lr", "batch_size", "steps", "success", "stamped")


@pytest.mark.parametrize("name, value", [*((name, 0) for name in POSITIVE), ("success", 2), ("stamped", 20)])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(UserError, match=rf"nc_unlearn\.{name} must be .*, got {value}"):
        NCUnlearn(**{name: value})
