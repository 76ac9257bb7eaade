"""What is said of odd defence sets, and what is not said of a good one."""

import torch

from rnp.cli.concerns import concerns
from rnp.types import ImageSet

CLASSES = tuple("abcdefgh")


def images(labels):
    return ImageSet(torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8), torch.tensor(labels), CLASSES)


def test_a_good_set_raises_none():
    data = images(list(range(8)) * 10)
    assert list(concerns(data, data.labels)) == []


def test_near_chance_few_and_absent():
    data = images([0, 1, 0, 1, 0, 1])
    near_chance, absent, few = concerns(data, torch.tensor([0, 5, 5, 5, 5, 5]))
    assert "0.167, near chance (0.125)" in near_chance and "class c, d, e, f, g and 1 more" in absent and "6 images" in few


def test_two_classes_whose_labels_are_swapped():
    data = images(list(range(8)) * 10)
    swapped = torch.where(data.labels == 2, 3, torch.where(data.labels == 3, 2, data.labels))
    (concern,) = concerns(data, swapped)
    assert "wrong on nearly all images of class c, d" in concern


def test_a_single_image_of_a_class():
    data = images([*range(7)] * 10 + [7])
    (concern,) = concerns(data, data.labels)
    assert "one image alone of class h" in concern
