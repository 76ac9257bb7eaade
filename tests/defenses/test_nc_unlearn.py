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
    search=NeuralCleanse(steps=300, precision="fp32"),
    steps=60,
    lr=3.0,
    batch_size=20,
    weight_decay=0,
    precision="fp32",
    augment=Augment(crop=0, flip=False),
)


@pytest.fixture
def defense_set():
    return DefenseSet(images(60), images(12, seed=1))


def trigger(label, area, success=1.0):
    """A mask of that area in a corner of 16 x 16 pixels, and a pattern that tells the labels
    apart.
    """
    mask = torch.zeros(256)
    mask[: int(area)] = 1
    mask[int(area)] = area % 1
    return RecoveredTrigger(
        label, mask.view(16, 16), torch.full((3, 16, 16), label / 5), success, 0.0
    )


def test_the_label_of_the_planted_corner_is_named(defense_set, rng):
    (found,) = METHOD.suspicious(METHOD.search.recover(Planted(), defense_set.train, rng=rng()))
    assert found.label == TARGET and found.mask[CORNER].sum() > 0.8 * found.l1


def test_the_trigger_found_is_unlearned(defense_set, rng):
    """The smallest mask makes the corner half as bright as the attacker does, so that is what is
    unlearned.
    """
    model, rows = Planted(), []
    model.bias.requires_grad_(False)  # else that alone would do
    method = dataclasses.replace(METHOD, steps=150, trigger_fraction=0.5)
    repaired = method.repair(model, defense_set, rng=rng(), on_epoch=rows.append).model
    test = images(60, seed=2)
    faint = test.images.clone()
    faint[:, :, CORNER] = 128

    def success(network):
        return (
            (predict(network, faint).argmax(1) == TARGET)[test.labels != TARGET]
            .float()
            .mean()
            .item()
        )

    assert (
        success(model) == 1
        and success(repaired) < 0.1
        and accuracy(repaired, test) == 1
        and rows[-1].step == 150
    )


def test_a_model_without_a_suspicious_label_stays_as_it_is(defense_set, rng):
    model, rows = Planted(corner=0.0), []
    repaired = METHOD.repair(model, defense_set, rng=rng(), on_epoch=rows.append).model
    assert repaired is not model and rows == []
    assert (repaired.corner, repaired.bias) == (model.corner, model.bias)


def test_sizes_are_judged_in_logarithms():
    """Logarithms 0, 3, 4, 5, 9/2: median 4, deviations 4, 1, 0, 1, .5, their median 1; 4 / 1.4826
    = 2.7 below.
    """
    triggers = [
        trigger(label, math.exp(power)) for label, power in enumerate((3.0, 0.0, 4.0, 4.5, 5.0))
    ]
    assert [each.label for each in NCUnlearn().suspicious(triggers)] == [1]
    assert [each.label for each in NCUnlearn(min_index=2.69).suspicious(triggers)] == [1]
    assert [each.label for each in NCUnlearn(min_index=2.71).suspicious(triggers)] == []


def test_a_trigger_that_moves_few_images_counts_as_the_whole_image():
    triggers = [trigger(label, 60 + label, success=0.9) for label in range(4)]
    assert NCUnlearn().suspicious([*triggers, trigger(4, 2, success=0.49)]) == []
    assert [
        each.label for each in NCUnlearn().suspicious([*triggers, trigger(4, 2, success=0.51)])
    ] == [4]


def test_every_flagged_label_is_stamped(defense_set, rng, monkeypatch):
    """Two labels flagged, all images stamped with the color of one of them: the model sees both
    colors and no other.
    """
    flagged = [
        RecoveredTrigger(label, torch.ones(8, 8), torch.full((1, 8, 8), label / 5), 1.0, 0.0)
        for label in (1, 4)
    ]
    monkeypatch.setattr(NCUnlearn, "suspicious", lambda *_: flagged)
    seen = set()
    monkeypatch.setattr(Planted, "forward", record(Planted.forward, seen))
    dataclasses.replace(METHOD, trigger_fraction=1.0, steps=3).repair(
        Planted(), defense_set, rng=rng()
    )
    assert seen == {0.2, 0.8}


def record(forward, seen):
    def listen(self, x):
        if self.training:
            seen.update(round(value, 3) for value in x.flatten().tolist())
        return forward(self, x)

    return listen


def test_a_share_of_the_images_is_painted(rng):
    """Each in one rectangle of one color, of 2 to 33 % of the image but for what rounding takes,
    all else as it was.
    """
    images = torch.full((500, 3, 32, 24), 2.0)  # no color
    changed = random_erase(images, 0.5, rng=rng()) != 2
    assert (images == 2).all() and (changed.any(1) == changed.all(1)).all()
    painted = changed.any(1).flatten(1).any(1)
    assert 0.4 < painted.float().mean() < 0.6
    areas = changed[painted][:, 0].flatten(1).float().mean(1)
    assert areas.min() < 0.03 and 0.28 < areas.max() <= 0.33
    for image, where in zip(
        random_erase(images, 1.0, rng=rng()), random_erase(images, 1.0, rng=rng())[:, 0] != 2
    ):
        rows, columns = where.any(1), where.any(0)
        assert (
            where.sum() == rows.sum() * columns.sum() and len(image[:, where].unique(dim=1).T) == 1
        )
        assert (
            rows.nonzero().flatten().diff().eq(1).all()
            and columns.nonzero().flatten().diff().eq(1).all()
        )


@pytest.mark.parametrize(
    "name, value",
    [
        ("lr", 0),
        ("batch_size", 0),
        ("steps", 0),
        ("stamped", 0),
        ("stamped", 20),
        ("painted", -1),
        ("painted", 50),
    ],
)
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(UserError, match=rf"nc_unlearn\.{name} must be .*, got {value}"):
        NCUnlearn(**{name: value})
