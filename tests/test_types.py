"""Bytes and floats, labels of a backdoor, large images behind files, rows of a history."""

import pytest
import torch

from rnp.attacks.base import BlendTrigger
from rnp.types import (
    DefenseSet,
    Epoch,
    PoisonedSet,
    backdoor_labels,
    take_images,
    to_bytes,
    to_floats,
)


def test_every_byte_survives():
    all_bytes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(to_floats(all_bytes)), all_bytes)


@pytest.mark.parametrize(
    ("value", "byte"), [(1.2, 255), (-0.3, 0), (0.5, 128), (100.6 / 255, 101), (100.4 / 255, 100)]
)
def test_clip_round_cast(value, byte):
    assert to_bytes(torch.full((1, 1, 1, 1), value)).item() == byte


def test_image_set_leaves_its_images_alone(toy_set):
    data = toy_set(4)
    data.as_floats().zero_()
    part = data.subset(torch.tensor([2, 0]))
    assert data.images.float().mean() > 0
    assert data.shape == (3, 8, 8)
    assert part.labels.tolist() == [2, 0]
    assert torch.equal(part.images[1], data.images[0])


@pytest.mark.parametrize("target, expected", [(1, [1, 1, 1, 1]), (None, [1, 2, 0, 1])])
def test_labels_of_a_backdoor(target, expected):
    assert backdoor_labels(torch.tensor([0, 1, 2, 0]), target, 3).tolist() == expected


def test_a_poisoned_set_changes_a_copy(toy_set):
    clean = toy_set(4)
    before = clean.images.clone()
    positions = torch.tensor([1, 3])
    black = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    covers = torch.tensor([False, True])
    trigger = BlendTrigger(torch.zeros(3, 8, 8), torch.ones(1, 8, 8))
    poisoned = PoisonedSet(positions, black, torch.tensor([0, 3]), covers, trigger)
    after = poisoned.apply(clean)
    assert after.images.flatten(1).any(1).tolist() == [True, False, True, False]
    assert after.labels.tolist() == [0, 0, 2, 3]
    assert torch.equal(clean.images, before)
    assert clean.labels.tolist() == [0, 1, 2, 3]


def test_a_row_is_flat():
    values = {"epoch": 1, "step": 2, "loss": 3, "accuracy": 4}
    values |= {"learning_rate": 5, "gradient_norm": 6}
    row = Epoch(**values, extra={"share/0": 7}).row()
    assert list(row.items()) == [*values.items(), ("share/0", 7)]


def test_a_large_copy_is_backed_by_a_file(toy_set, monkeypatch, is_mapped):
    data = toy_set(2500)
    positions = torch.arange(2400).flip(0)
    monkeypatch.setattr("rnp.types.LARGE", 1000)
    copied = take_images(data.images, positions)
    assert is_mapped(copied)
    assert torch.equal(copied, data.images[positions])
    copied.zero_()
    assert data.images.float().mean() > 0
    assert not is_mapped(take_images(data.images, positions[:2]))


def test_both_halves_of_a_defense_set(toy_set, monkeypatch, is_mapped):
    halves = DefenseSet(toy_set(1200), toy_set(7, seed=1))
    small = halves.all
    monkeypatch.setattr("rnp.types.LARGE", 1000)
    large = halves.all
    assert is_mapped(large.images)
    assert not is_mapped(small.images)
    assert len(large) == 1207
    assert large.classes == halves.train.classes
    for both in (small, large):
        assert torch.equal(both.images, torch.cat([halves.train.images, halves.val.images]))
        assert torch.equal(both.labels, torch.cat([halves.train.labels, halves.val.labels]))
