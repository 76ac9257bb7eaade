"""The variants with the unlearned model: what each takes from it, and that all else is as
without.
"""

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
from rnp.errors import UserError
from rnp.prune import Prune
from rnp.recover import Recover
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
    return all(
        torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items()
    )


def test_each_variant_has_the_options_of_its_defense_with_the_same_defaults():
    assert VARIANTS == [f"{name}{UNLEARNED}" for name in ("anp", "fp", "ft", "nad")]
    for name in VARIANTS:
        variant, plain = (
            registry.load("defense", name)(),
            registry.load("defense", name.removesuffix(UNLEARNED))(),
        )
        assert isinstance(variant, type(plain)) and vars(plain).items() <= vars(variant).items()
        assert not variant.unlearn.until_collapse, "it stops where the trajectory may end"


@pytest.mark.parametrize(
    "plain, variant, nothing",
    [
        (FT, FTUnlearned, {"share": 0.0}),
        (ANP, ANPUnlearned, {}),
        (
            NAD,
            NADUnlearned,
            {
                "teacher_steps": 4,
                "prune": Prune(rule="number", num_neurons=0),
                "recover": Recover(steps=2),
            },
        ),
    ],
)
def test_where_unlearning_says_nothing_the_two_are_one(
    plain, variant, nothing, trained, defense_set, rng
):
    """The variant draws the same images then, although unlearning drew some first."""
    shared = {name: value for name, value in nothing.items() if name == "teacher_steps"}
    one = plain(**SHORT, **shared).repair(trained, defense_set, rng=rng(1)).model
    assert same(
        one,
        variant(**SHORT, **nothing, unlearn=Nothing())
        .repair(trained, defense_set, rng=rng(1))
        .model,
    )


def test_the_weights_that_moved_most_start_from_zero(trained):
    """One channel of sixteen, and half of its 72 weights."""
    moved = Planted()(trained, None, rng=torch.Generator()).model
    weakened = FTUnlearned(share=1 / 16, zeroed=0.5).zero_changed_weights(trained, moved)
    expected = copy.deepcopy(trained)
    with torch.no_grad():
        expected.conv2.weight[3, :4] = 0
    assert same(weakened, expected)


def test_the_classifier_keeps_its_weights(trained):
    moved = copy.deepcopy(trained)
    with torch.no_grad():
        moved.fc.weight += 9
        moved.conv1.weight[2] += 1
    weakened = FTUnlearned(share=1 / 16, zeroed=1.0).zero_changed_weights(trained, moved)
    assert torch.equal(weakened.fc.weight, trained.fc.weight) and not weakened.conv1.weight[2].any()


def test_features_that_sleep_and_wake_go_first(trained, defense_set, rng):
    """Feature 5 sleeps in the given model and wakes in the unlearned one; feature 2 sleeps in
    both.
    """
    with torch.no_grad():
        trained.bn2.bias[[2, 5]] -= 99

    @dataclass(frozen=True, kw_only=True)
    class Waking(Nothing):
        def __call__(self, model, clean, *, rng, on_epoch=lambda _: None):
            moved = super().__call__(model, clean, rng=rng).model
            with torch.no_grad():
                moved.bn2.bias[5] += 99
            return Unlearned(moved, {}, [], True, 1, 0.5, 0)

    score = FPUnlearned(unlearn=Waking()).score(trained, defense_set, rng=rng())
    assert score.argmin() == 5 and FP().score(trained, defense_set, rng=rng()).argmin() == 2
    assert rank(torch.tensor([3.0, 1.0, 2.0, 1.0])).tolist() == [3, 0, 2, 1]


def test_masks_are_sought_in_the_unlearned_model_and_cut_from_the_given_one(
    trained, defense_set, rng
):
    moved = Planted()(trained, None, rng=rng()).model
    found = ANPUnlearned(**SHORT, unlearn=Planted()).score(trained, defense_set, rng=rng(1))
    expected = ANP(**SHORT).score(moved, defense_set, rng=rng(1))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    repaired = ANPUnlearned(
        **SHORT, unlearn=Planted(), prune=Prune(rule="number", num_neurons=2)
    ).repair(trained, defense_set, rng=rng(1))
    assert torch.equal(repaired.model.conv2.weight, trained.conv2.weight)


def test_the_teacher_has_lost_what_the_unlearned_model_exposes(trained, defense_set, rng):
    own = rng(1)
    unlearned = Planted()(trained, defense_set.train, rng=own).model
    recover, prune = Recover(steps=3), Prune(rule="number", num_neurons=3)
    expected = prune(
        trained, recover(unlearned, defense_set.train, rng=own).mask, defense_set.all
    ).model
    method = NADUnlearned(unlearn=Planted(), recover=recover, prune=prune)
    assert same(method.initial_teacher(trained, defense_set, rng=rng(1)), expected)


@pytest.mark.parametrize("name", ["share", "zeroed"])
def test_shares_are_no_percent(name):
    with pytest.raises(
        UserError,
        match=rf"ft_unlearned\.{name} must be in \[0, 1\], got 5; it is a fraction, not percent",
    ):
        FTUnlearned(**{name: 5})
