"""Soft masks: their floor, what they multiply, and that a large penalty keeps them at 1."""

import dataclasses
import math

import pytest
import torch

from rnp.defenses.nft import NFT
from rnp.errors import UserError
from rnp.neurons.masks import forward_masked
from rnp.training.augment import Augment
from rnp.types import DefenseSet

METHOD = NFT(steps=30, batch_size=20, augment=Augment(crop=0, flip=False))


@pytest.fixture
def defense_set(toy_set):
    return DefenseSet(toy_set(40, seed=3), toy_set(8, seed=4))


def test_the_repaired_model_is_the_masked_one(trained, defense_set, toy_set, rng):
    images = toy_set(12).as_floats()
    masks = METHOD.masks(trained, defense_set, rng=rng())
    assert any((value < 1).any() for value in masks.values())
    repaired = METHOD.repair(trained, defense_set, rng=rng()).model
    assert torch.allclose(repaired(images), forward_masked(trained, images, masks), atol=1e-5)


def test_no_mask_falls_below_the_floor_of_its_layer(trained, defense_set, rng):
    """Driven down by a negative penalty, every mask ends on its floor."""
    method = dataclasses.replace(METHOD, decay=0.7)
    object.__setattr__(method, "sparsity", -100.0)
    for i, value in enumerate(method.masks(trained, defense_set, rng=rng()).values(), 1):
        assert value == pytest.approx(0.8 * math.exp(-0.7 * i))


def test_a_large_penalty_leaves_the_model_as_it_was(trained, defense_set, rng):
    masks = dataclasses.replace(METHOD, sparsity=100.0).masks(trained, defense_set, rng=rng())
    assert all((value == 1).all() for value in masks.values())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("floor", 1.5, r"nft\.floor must be in \[0, 1\], got 1\.5"),
        ("lr", 0, r"nft\.lr must be above 0, got 0"),
        ("batch_size", 0, r"nft\.batch_size must be above 0, got 0"),
        ("steps", 0, r"nft\.steps must be above 0, got 0"),
        ("sparsity", -1, r"nft\.sparsity must be 0 or more, got -1"),
        ("decay", -1, r"nft\.decay must be 0 or more, got -1"),
    ],
)
def test_impossible_settings_are_refused(name, value, message):
    with pytest.raises(UserError, match=message):
        NFT(**{name: value})
