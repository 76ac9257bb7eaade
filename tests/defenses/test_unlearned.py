"""The variants with the unlearned model: what each uses of it, and that all else is as without."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from rnp import registry
from rnp.defenses.anp import ANP
from rnp.defenses.anp_unlearned import ANPUnlearned
from rnp.defenses.base import UNLEARNED
from rnp.defenses.fp import FP
from rnp.defenses.fp_unlearned import FPUnlearned, rank
from rnp.defenses.ft import FT
from rnp.defenses.ft_unlearned import FTUnlearned
from rnp.defenses.nad import NAD
from rnp.defenses.nad_unlearned import NADUnlearned
from rnp.defenses.rnp import RNP
from rnp.errors import UserError
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.seeds import child
from rnp.training.augment import Augment
from rnp.types import DefenseSet
from rnp.unlearn import Unlearn, Unlearned

VARIANTS = [name for name in registry.names("defense") if name.endswith(UNLEARNED)]
SHORT = {"steps": 6, "batch_size": 16, "augment": Augment(crop=0)}


@pytest.fixture
def defense_set(toy_set):
    return DefenseSet(toy_set(40, seed=3), toy_set(40, seed=4))


@dataclass(frozen=True, kw_only=True)
class Nothing(Unlearn):
    """Unlearns nothing, but draws."""

    def __call__(self, model, clean, *, rng, on_epoch=lambda _: None):
        torch.rand(5, generator=rng)
        return Unlearned(copy.deepcopy(model), {}, [], True, 1, 0.5, 0)


@dataclass(frozen=True, kw_only=True)
class Planted(Nothing):
    """Moves a kernel, some of its weights more than others."""

    def __call__(self, model, clean, *, rng, on_epoch=lambda _: None):
        moved = super().__call__(model, clean, rng=rng).model
        with torch.no_grad():
            moved.conv2.weight[3] += 1
            moved.conv2.weight[3, :4] += 1
        return Unlearned(moved, {}, [], True, 1, 0.5, 0)


def same(one: nn.Module, other: nn.Module) -> bool:
    other_state = other.state_dict()
    return all(torch.equal(value, other_state[name]) for name, value in one.state_dict().items())


def test_each_variant_has_the_options_of_its_defense_with_the_same_defaults():
    assert VARIANTS == [f"{name}{UNLEARNED}" for name in ("anp", "fp", "ft", "nad")]
    for name in VARIANTS:
        variant = registry.load("defense", name)()
        plain = registry.load("defense", name.removesuffix(UNLEARNED))()
        assert isinstance(variant, type(plain))
        assert vars(plain).items() <= vars(variant).items()
        assert not variant.unlearn.until_collapse, "unlearning ends at the stop"


@pytest.mark.parametrize(
    "plain, variant",
    [
        (FT(**SHORT), FTUnlearned(**SHORT, channel_fraction=0.0, unlearn=Nothing())),
        (ANP(**SHORT), ANPUnlearned(**SHORT, unlearn=Nothing())),
        (
            NAD(**SHORT, teacher_steps=4),
            NADUnlearned(
                **SHORT,
                teacher_steps=4,
                unlearn=Nothing(),
                recover=Recover(steps=2),
                prune=Prune(rule="number", num_neurons=0),
            ),
        ),
    ],
    ids=["ft", "anp", "nad"],
)
def test_where_unlearning_changes_nothing_the_two_are_one(
    plain, variant, trained, defense_set, rng
):
    """The variant then draws the same images, although unlearning drew some first."""
    one, other = (
        method.repair(trained, defense_set, rng=rng(1)).model for method in (plain, variant)
    )
    assert same(one, other)


def test_the_weights_that_moved_most_start_from_zero(trained):
    """One channel of sixteen, and half of its 72 weights."""
    moved = Planted()(trained, None, rng=torch.Generator()).model
    method = FTUnlearned(channel_fraction=1 / 16, weight_fraction=0.5)
    expected = copy.deepcopy(trained)
    with torch.no_grad():
        expected.conv2.weight[3, :4] = 0
    assert same(method.zero_changed_weights(trained, moved), expected)


def test_the_classifier_keeps_its_weights(trained):
    moved = copy.deepcopy(trained)
    with torch.no_grad():
        moved.fc.weight += 9
        moved.conv1.weight[2] += 1
    method = FTUnlearned(channel_fraction=1 / 16, weight_fraction=1.0)
    zeroed = method.zero_changed_weights(trained, moved)
    assert torch.equal(zeroed.fc.weight, trained.fc.weight)
    assert not zeroed.conv1.weight[2].any()


def test_features_that_are_dormant_and_activate_go_first(trained, defense_set, rng):
    """Feature 5 is dormant in the given model and active in the unlearned one; feature 2 is dormant
    in both.
    """
    with torch.no_grad():
        trained.bn2.bias[[2, 5]] -= 99

    @dataclass(frozen=True, kw_only=True)
    class Activating(Nothing):
        def __call__(self, model, clean, *, rng, on_epoch=lambda _: None):
            moved = super().__call__(model, clean, rng=rng).model
            with torch.no_grad():
                moved.bn2.bias[5] += 99
            return Unlearned(moved, {}, [], True, 1, 0.5, 0)

    score = FPUnlearned(unlearn=Activating()).score(trained, defense_set, rng=rng())
    assert score.argmin() == 5
    assert FP().score(trained, defense_set, rng=rng()).argmin() == 2


def test_ranks_of_ties_follow_the_index():
    assert rank(torch.tensor([3.0, 1.0, 2.0, 1.0])).tolist() == [3, 0, 2, 1]


def test_masks_are_optimized_in_the_unlearned_model_and_the_given_one_is_pruned(
    trained, defense_set, rng
):
    moved = Planted()(trained, None, rng=rng()).model
    prune = Prune(rule="number", num_neurons=2)
    method = ANPUnlearned(**SHORT, unlearn=Planted(), prune=prune)
    score = method.score(trained, defense_set, rng=rng(1))
    expected = ANP(**SHORT).score(moved, defense_set, rng=rng(1))
    assert all(torch.equal(score[name], expected[name]) for name in expected)
    repaired = method.repair(trained, defense_set, rng=rng(1))
    assert torch.equal(repaired.model.conv2.weight, trained.conv2.weight)
    assert repaired.chosen.pruned == 2


def test_the_teacher_starts_from_the_model_that_rnp_repairs(trained, defense_set, rng):
    """By the steps, each with its own generator, and by the method."""
    recover, prune = Recover(steps=3), Prune(rule="number", num_neurons=3)
    method = NADUnlearned(unlearn=Planted(), recover=recover, prune=prune)
    train = defense_set.train
    unlearned = Planted()(trained, train, rng=child(rng(1), "unlearn")).model
    mask = recover(unlearned, train, rng=child(rng(1), "recover")).mask
    expected = prune(trained, mask, defense_set.all).model
    by_rnp = RNP(unlearn=Planted(), recover=recover, prune=prune)
    teacher = method.initial_teacher(trained, defense_set, rng=rng(1))
    assert same(teacher, expected)
    assert same(teacher, by_rnp.repair(trained, defense_set, rng=rng(1)).model)
    assert not same(teacher, trained)


@pytest.mark.parametrize("name", ["channel_fraction", "weight_fraction"])
def test_fractions_are_not_percent(name):
    message = rf"ft_unlearned\.{name} must be in \[0, 1\], got 5; it is a fraction, not percent"
    with pytest.raises(UserError, match=message):
        FTUnlearned(**{name: 5})
