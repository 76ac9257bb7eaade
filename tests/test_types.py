"""Bytes and floats, and the rows of a history."""

import pytest
import torch

from rnp.types import DefenseSet, Epoch, take_images, to_bytes, to_floats


def test_every_byte_survives():
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_bytes(to_floats(every)), every)


@pytest.mark.parametrize(
    ("value", "byte"), [(1.2, 255), (-0.3, 0), (0.5, 128), (100.6 / 255, 101), (100.4 / 255, 100)]
)
def test_clip_round_cast(value, byte):
    assert to_bytes(torch.full((1, 1, 1, 1), value)).item() == byte


def test_image_set_leaves_its_images_alone(toy_set):
    data = toy_set(4)
    data.as_floats().zero_()
    part = data.subset(torch.tensor([2, 0]))
    assert (
        data.images.float().mean() > 0
        and part.labels.tolist() == [2, 0]
        and data.shape == (3, 8, 8)
    )
    assert torch.equal(part.images[1], data.images[0])


def test_a_row_is_flat():
    row = Epoch(
        epoch=1, step=2, loss=3, accuracy=4, learning_rate=5, gradient_norm=6, extra={"share/0": 7}
    ).row()
    assert list(row) == [
        "epoch",
        "step",
        "loss",
        "accuracy",
        "learning_rate",
        "gradient_norm",
        "share/0",
    ]
    assert list(row.values()) == [1, 2, 3, 4, 5, 6, 7]


def test_a_large_copy_lies_behind_a_file(toy_set, monkeypatch, is_mapped):
    data, positions = toy_set(2500), torch.arange(2400).flip(0)
    monkeypatch.setattr("rnp.types.LARGE", 1000)
    copied = take_images(data.images, positions)
    assert is_mapped(copied) and torch.equal(copied, data.images[positions])
    copied.zero_()
    assert data.images.float().mean() > 0
    assert not is_mapped(take_images(data.images, positions[:2]))


def test_both_halves_of_a_defense_set(toy_set, monkeypatch, is_mapped):
    halves = DefenseSet(toy_set(1200), toy_set(7, seed=1))
    small = halves.all
    monkeypatch.setattr("rnp.types.LARGE", 1000)
    large = halves.all
    assert (
        is_mapped(large.images)
        and not is_mapped(small.images)
        and len(large) == 1207
        and large.classes == halves.train.classes
    )
    for both in (small, large):
        assert torch.equal(both.images, torch.cat([halves.train.images, halves.val.images]))
        assert torch.equal(both.labels, torch.cat([halves.train.labels, halves.val.labels]))
