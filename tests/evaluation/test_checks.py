"""Which defense sets are refused, and which problems of the others are reported."""

import pytest
import torch
import torch.nn.functional as F

from rnp.errors import UserError
from rnp.evaluation.checks import check_and_warn, find_problems, require_usable
from rnp.models.build import Architecture
from rnp.types import DefenseSet, ImageSet

CLASSES = tuple("abcdefgh")


def images(labels, classes=CLASSES, channels=3, side=4):
    return ImageSet(
        torch.zeros(len(labels), channels, side, side, dtype=torch.uint8),
        torch.tensor(labels, dtype=torch.int64),
        classes,
    )


def logits(predicted, k=8, sure=True):
    return F.one_hot(torch.as_tensor(predicted), k) * (20.0 if sure else 1.0)


def problems(data, predicted, k=8, sure=True):
    return list(find_problems(data, logits(predicted, k, sure)))


def test_a_good_set_has_no_problem():
    data = images(list(range(8)) * 32)
    assert problems(data, data.labels) == []


def test_near_chance_few_and_absent():
    near_chance, absent, few = problems(images([0, 1, 0, 1, 0, 1]), [0, 5, 5, 5, 5, 5])
    assert "0.167, near chance (0.125)" in near_chance
    assert "class c, d, e, f, g and 1 more" in absent
    assert "6 images" in few


@pytest.mark.parametrize(
    "k, right, near", [(2, 60, False), (2, 54, True), (8, 25, False), (8, 20, True)]
)
def test_chance_depends_on_the_number_of_classes(k, right, near):
    """A tenth of the way from chance to perfection counts as chance."""
    data = images([i % k for i in range(100)], CLASSES[:k])
    predicted = torch.where(torch.arange(100) < right, data.labels, (data.labels + 1) % k)
    assert any("near chance" in problem for problem in problems(data, predicted, k, False)) == near


def test_two_classes_whose_labels_are_swapped():
    data = images(list(range(8)) * 32)
    swapped = torch.where(data.labels == 2, 3, torch.where(data.labels == 3, 2, data.labels))
    (problem,) = problems(data, swapped)
    assert "wrong on nearly all images of class c, d" in problem


@pytest.mark.parametrize(
    "wrong, sure, reported", [(52, True, True), (52, False, False), (25, True, False)]
)
def test_scattered_wrong_labels(wrong, sure, reported):
    """Errors on a tenth of the images are common, confident ones are not."""
    data = images(list(range(8)) * 32)
    predicted = torch.where(torch.arange(256) < wrong, (data.labels + 1) % 8, data.labels)
    expected = (
        f"the model is sure of another class on {wrong} of 256 images: if their labels are wrong,"
        " the repair removes what is right and keeps what is wrong"
    )
    assert problems(data, predicted, sure=sure) == ([expected] if reported else [])


def test_a_single_image_of_a_class():
    data = images([*range(7)] * 40 + [7])
    (problem,) = problems(data, data.labels)
    assert "only one image of class h" in problem


def test_one_image_of_each_class():
    data = images(list(range(8)))
    single, few = problems(data, data.labels)
    assert "only one image of class a, b, c, d, e and 3 more" in single
    assert "8 images are few" in few


GOOD = list(range(8)) * 3


@pytest.mark.parametrize(
    "train, val, words",
    [
        (images(GOOD), images([]), "one part of the defense set has no images"),
        (
            images([2] * 30),
            images(GOOD),
            "all 30 images to optimize on are of class c; a model that always predicts that",
        ),
        (
            images(GOOD, CLASSES[::-1]),
            images(GOOD),
            r"8 classes \(h, g, f, e, d and 3 more\), the model 8 \(a, b, .*in the same order",
        ),
        (images(GOOD, (*CLASSES, "i")), images(GOOD), "the defense set has 9 classes"),
        (
            images(GOOD, channels=1),
            images(GOOD, channels=1),
            r"are \[1, 4, 4\]; the model takes 3 channels",
        ),
        (
            images(GOOD),
            images(GOOD, side=5),
            r"are \[3, 4, 4\] and \[3, 5, 5\]; .*all images must be of one size",
        ),
    ],
)
def test_unusable_sets_are_refused(train, val, words):
    with pytest.raises(UserError, match=words):
        require_usable(DefenseSet(train, val), CLASSES, 3)


def test_a_class_may_be_absent():
    require_usable(DefenseSet(images([0, 1] * 20), images([5])), CLASSES, 3)


def test_problems_are_printed_on_stderr(capsys, rng):
    model = Architecture(arch="resnet10", width=4).build(
        8, 3, torch.full((3,), 0.5), torch.ones(3), rng=rng()
    )
    defense = DefenseSet(images(GOOD), images(GOOD))
    assert check_and_warn(model, CLASSES, defense) is defense
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("warning: accuracy on the clean images is 0.125, near chance")
    assert lines[1].startswith("warning: 48 images are few")
