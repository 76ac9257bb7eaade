"""Unlearning of recovered triggers, on a classifier in which a bright corner sends every image to
class 3.
"""

import dataclasses
import math

import pytest
import torch
from planted import CORNER, TARGET, Planted, images

from rnp.defenses.nc_unlearn import NCUnlearn, random_erase
from rnp.detection.base import RecoveredTrigger
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.training.augment import Augment
from rnp.training.predict import accuracy, predict
from rnp.types import DefenseSet

METHOD = NCUnlearn(
    search=NeuralCleanse(steps=300),
    steps=60,
    lr=3.0,
    batch_size=20,
    weight_decay=0,
    augment=Augment(crop=0, flip=False),
)


@pytest.fixture
def defense_set():
    return DefenseSet(images(60), images(12, seed=1))


def trigger(label, area, success=1.0):
    """A mask of that area in a corner of 16 x 16 pixels; the pattern depends on the label."""
    mask = torch.zeros(256)
    mask[: int(area)] = 1
    mask[int(area)] = area % 1
    pattern = torch.full((3, 16, 16), label / 5)
    return RecoveredTrigger(label, mask.view(16, 16), pattern, success, 0.0)


def suspicious_labels(method, triggers):
    return [trigger.label for trigger in method.suspicious(triggers)]


def test_the_label_of_the_planted_corner_is_suspicious(defense_set, rng):
    triggers = METHOD.search.recover(Planted(), defense_set.train, rng=rng())
    (suspicious,) = METHOD.suspicious(triggers)
    assert suspicious.label == TARGET
    assert suspicious.mask[CORNER].sum() > 0.8 * suspicious.l1


def test_the_recovered_trigger_is_unlearned(defense_set, rng):
    """The smallest mask makes the corner half as bright as the attacker does, so that is what is
    unlearned.
    """
    model, rows = Planted(), []
    model.bias.requires_grad_(False)  # else the bias alone would suffice
    method = dataclasses.replace(METHOD, steps=150, trigger_fraction=0.5)
    result = method.repair(model, defense_set, rng=rng(), on_epoch=rows.append)
    assert result.tuned_labels == [TARGET]
    repaired = result.model
    test = images(60, seed=2)
    faint = test.images.clone()
    faint[:, :, CORNER] = 128

    def success(network):
        reached = predict(network, faint).argmax(1) == TARGET
        return reached[test.labels != TARGET].float().mean().item()

    assert success(model) == 1
    assert success(repaired) < 0.1
    assert accuracy(repaired, test) == 1
    assert rows[-1].step == 150


def test_a_model_without_a_suspicious_label_stays_as_it_is(defense_set, rng):
    model, rows = Planted(corner=0.0), []
    repaired = METHOD.repair(model, defense_set, rng=rng(), on_epoch=rows.append).model
    assert repaired is not model
    assert rows == []
    assert (repaired.corner, repaired.bias) == (model.corner, model.bias)


def test_sizes_are_compared_by_logarithms():
    """Logarithms 0, 3, 4, 5, 9/2: median 4, deviations 4, 1, 0, 1, .5, their median 1; 4 / 1.4826
    = 2.7 below.
    """
    triggers = [
        trigger(label, math.exp(power)) for label, power in enumerate((3.0, 0.0, 4.0, 4.5, 5.0))
    ]
    assert suspicious_labels(NCUnlearn(), triggers) == [1]
    assert suspicious_labels(NCUnlearn(min_index=2.69), triggers) == [1]
    assert suspicious_labels(NCUnlearn(min_index=2.71), triggers) == []


def test_a_trigger_that_moves_few_images_counts_as_the_whole_image():
    triggers = [trigger(label, 60 + label, success=0.9) for label in range(4)]
    for success, labels in ((0.49, []), (0.51, [4])):
        small = trigger(4, 2, success=success)
        assert suspicious_labels(NCUnlearn(), [*triggers, small]) == labels


def test_the_triggers_of_all_suspicious_labels_are_used(defense_set, rng, monkeypatch):
    """Two suspicious labels, all images covered with the color of one of them: the model gets both
    colors and no other.
    """
    suspicious = [
        RecoveredTrigger(label, torch.ones(8, 8), torch.full((1, 8, 8), label / 5), 1.0, 0.0)
        for label in (1, 4)
    ]
    monkeypatch.setattr(NCUnlearn, "suspicious", lambda *_: suspicious)
    colors = set()
    monkeypatch.setattr(Planted, "forward", record(Planted.forward, colors))
    method = dataclasses.replace(METHOD, trigger_fraction=1.0, steps=3)
    method.repair(Planted(), defense_set, rng=rng())
    assert colors == {0.2, 0.8}


def record(forward, colors):
    def forward_and_record(self, x):
        if self.training:
            colors.update(round(value, 3) for value in x.flatten().tolist())
        return forward(self, x)

    return forward_and_record


def test_a_fraction_of_the_images_has_a_rectangle_erased(rng):
    """Each in one rectangle of one color, of 2 to 33 % of the image but for rounding, all else as
    it was.
    """
    images = torch.full((500, 3, 32, 24), 2.0)  # no color
    changed = random_erase(images, 0.5, rng=rng()) != 2
    assert (images == 2).all()
    assert (changed.any(1) == changed.all(1)).all()
    erased = changed.any(1).flatten(1).any(1)
    assert 0.4 < erased.float().mean() < 0.6
    areas = changed[erased][:, 0].flatten(1).float().mean(1)
    assert areas.min() < 0.03
    assert 0.28 < areas.max() <= 0.33


def test_what_is_erased_is_a_rectangle_of_one_color(rng):
    erased = random_erase(torch.full((500, 3, 32, 24), 2.0), 1.0, rng=rng())
    for image in erased:
        inside = image[0] != 2
        rows, columns = inside.any(1), inside.any(0)
        assert inside.sum() == rows.sum() * columns.sum()
        assert rows.nonzero().flatten().diff().eq(1).all()
        assert columns.nonzero().flatten().diff().eq(1).all()
        assert len(image[:, inside].unique(dim=1).T) == 1


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        ("lr", 0, "above 0"),
        ("batch_size", 0, "above 0"),
        ("steps", 0, "above 0"),
        ("trigger_fraction", 0, r"in \(0, 1\]"),
        ("trigger_fraction", 20, r"in \(0, 1\]"),
        ("erase_fraction", -1, r"in \[0, 1\]"),
        ("erase_fraction", 50, r"in \[0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError, match=rf"nc_unlearn\.{name} must be {bounds}, got {value}"):
        NCUnlearn(**{name: value})
