"""What is said of odd defense sets, and what is not said of a good one; and which are refused."""

import pytest
import torch
import torch.nn.functional as F

from rnp.errors import UserError
from rnp.evaluation.checks import find_problems, require_usable
from rnp.types import DefenseSet, ImageSet

CLASSES = tuple("abcdefgh")


def images(labels, classes=CLASSES, channels=3, side=4):
    return ImageSet(
        torch.zeros(len(labels), channels, side, side, dtype=torch.uint8),
        torch.tensor(labels, dtype=torch.int64),
        classes,
    )


def says(predicted, k=8, sure=True):
    return F.one_hot(torch.as_tensor(predicted), k) * (20.0 if sure else 1.0)


def test_a_good_set_raises_none():
    data = images(list(range(8)) * 32)
    assert list(find_problems(data, says(data.labels))) == []


def test_near_chance_few_and_absent():
    data = images([0, 1, 0, 1, 0, 1])
    near_chance, absent, few = find_problems(data, says([0, 5, 5, 5, 5, 5]))
    assert (
        "0.167, near chance (0.125)" in near_chance
        and "class c, d, e, f, g and 1 more" in absent
        and "6 images" in few
    )


@pytest.mark.parametrize(
    "k, right, near", [(2, 60, False), (2, 54, True), (8, 25, False), (8, 20, True)]
)
def test_chance_depends_on_the_number_of_classes(k, right, near):
    """A tenth of the way from chance to perfection counts as chance."""
    data = images([i % k for i in range(100)], CLASSES[:k])
    predicted = torch.where(torch.arange(100) < right, data.labels, (data.labels + 1) % k)
    assert (
        any(
            "near chance" in concern
            for concern in find_problems(data, says(predicted, k, sure=False))
        )
        == near
    )


def test_two_classes_whose_labels_are_swapped():
    data = images(list(range(8)) * 32)
    swapped = torch.where(data.labels == 2, 3, torch.where(data.labels == 3, 2, data.labels))
    (concern,) = find_problems(data, says(swapped))
    assert "wrong on nearly all images of class c, d" in concern


@pytest.mark.parametrize(
    "wrong, sure, said", [(52, True, True), (52, False, False), (25, True, False)]
)
def test_scattered_wrong_labels(wrong, sure, said):
    """A model is hardly ever sure of another class on a tenth of the images; unsure it may well
    be.
    """
    data = images(list(range(8)) * 32)
    predicted = torch.where(torch.arange(256) < wrong, (data.labels + 1) % 8, data.labels)
    found = list(find_problems(data, says(predicted, sure=sure)))
    assert found == (
        [
            f"the model is sure of another class on {wrong} of 256 images: if their labels are"
            " wrong, the repair unlearns what is right and keeps what is wrong"
        ]
        if said
        else []
    )


def test_a_single_image_of_a_class():
    data = images([*range(7)] * 40 + [7])
    (concern,) = find_problems(data, says(data.labels))
    assert "one image alone of class h" in concern


def test_one_image_of_each_class():
    single, few = find_problems(data := images(list(range(8))), says(data.labels))
    assert (
        "one image alone of class a, b, c, d, e and 3 more" in single and "8 images are few" in few
    )


GOOD = list(range(8)) * 3


@pytest.mark.parametrize(
    "train, val, words",
    [
        (images(GOOD), images([]), "one part of the defense set holds no images"),
        (images([2] * 30), images(GOOD), "all 30 images to optimize on are of class c"),
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
def test_sets_that_no_repair_can_rest_on(train, val, words):
    with pytest.raises(UserError, match=words):
        require_usable(DefenseSet(train, val), CLASSES, 3)


def test_a_class_may_be_absent():
    require_usable(DefenseSet(images([0, 1] * 20), images([5])), CLASSES, 3)
