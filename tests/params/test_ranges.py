"""Ranges in annotations: what each constraint allows, and the message for what it does not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen

from rnp.attacks.badnets import BadNets
from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters, bounds_of, constraints_of, describe, unwrap
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.training.augment import Augment
from rnp.training.recipe import Train
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class Numbers(Hyperparameters):
    section: ClassVar[str] = "numbers"

    free: Annotated[float, "any number"] = 0.0
    plain: float = 0.0
    gt: Annotated[float, Gt(0), "positive"] = 1.0
    ge: Annotated[int, Ge(2), "at least two"] = 2
    lt: Annotated[float, Lt(5), "less than five"] = 0.0
    le: Annotated[float, Le(5), "at most five"] = 0.0
    share: Annotated[float, Interval(gt=0, le=1), "a share, not none"] = 0.5
    rate: Annotated[float, Interval(ge=0, lt=1), "a share, not all"] = 0.5
    side: Annotated[int, Interval(ge=2, le=64), "pixels"] = 3
    text_first: Annotated[float, "text before the range", Gt(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class Several(Hyperparameters):
    section: ClassVar[str] = "several"

    sizes: Annotated[tuple[Annotated[int, Gt(0)], ...], MinLen(1), "some sizes"] = (1,)
    pair: Annotated[tuple[float, ...], MinLen(2), "two or more"] = (1.0, 2.0)
    names: Annotated[tuple[str, ...], MinLen(1), "some names"] = ("a",)
    shares: Annotated[tuple[float, ...], Interval(ge=0, le=1), "shares"] = ()


@dataclass(frozen=True, kw_only=True)
class Inner(Hyperparameters):
    lr: Annotated[float, Gt(0), "learning rate"] = 0.1


@dataclass(frozen=True, kw_only=True)
class Outer(Inner):
    section: ClassVar[str] = "outer"

    inner: Inner = Inner()
    steps: Annotated[int, Gt(0), "steps"] = 1


def message(cls: type, **values: object) -> str:
    with pytest.raises(UserError) as caught:
        cls(**values)
    return str(caught.value)


@pytest.mark.parametrize(
    "name, values",
    [
        ("free", (-math.inf, -1.0, math.nan)),
        ("plain", (-1.0, math.nan)),
        ("gt", (1e-300, 1.0, math.inf)),
        ("ge", (2, 100)),
        ("lt", (-math.inf, 4.999)),
        ("le", (-1.0, 5.0)),
        ("share", (1e-9, 1.0)),
        ("rate", (0.0, 0.999)),
        ("side", (2, 3, 64)),
    ],
)
def test_values_in_range(name, values):
    for value in values:
        assert getattr(Numbers(**{name: value}), name) is value


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("gt", 0.0, "above 0, got 0"),
        ("gt", -2.5, "above 0, got -2.5"),
        ("ge", 1, "at least 2, got 1"),
        ("lt", 5.0, "below 5, got 5"),
        ("le", 5.5, "at most 5, got 5.5"),
        ("share", 0.0, "in (0, 1], got 0"),
        ("share", -0.5, "in (0, 1], got -0.5"),
        ("rate", -0.1, "in [0, 1), got -0.1"),
        ("rate", 1.0, "in [0, 1), got 1"),
        ("side", 1, "from 2 to 64, got 1"),
        ("side", 65, "from 2 to 64, got 65"),
        ("text_first", 0.0, "above 0, got 0"),
    ],
)
def test_values_out_of_range(name, value, words):
    assert message(Numbers, **{name: value}) == f"numbers.{name} must be {words}"


@pytest.mark.parametrize("name", ["gt", "lt", "le", "share", "rate"])
def test_nan_is_in_no_range(name):
    assert message(Numbers, **{name: math.nan}).endswith(", got nan")


@pytest.mark.parametrize(
    "name, value, suggestion",
    [
        ("share", 10.0, "0.1"),
        ("share", 100.0, "1"),
        ("share", 1.5, "0.015"),
        ("share", 101.0, None),  # is not a percentage
        ("rate", 5.0, "0.05"),
        ("rate", 100.0, None),  # 1 is out of range too
        ("rate", -5.0, None),
        ("side", 65, None),  # is not a fraction
        ("lt", 50.0, None),
    ],
)
def test_percent_instead_of_a_fraction(name, value, suggestion):
    hint = f"; it is a fraction, not percent: did you mean {suggestion}?"
    text = message(Numbers, **{name: value})
    assert text.endswith(hint) if suggestion else "percent" not in text


def test_the_first_value_out_of_range_is_named():
    assert message(Numbers, share=2.0, gt=0.0).startswith("numbers.gt ")


def test_each_of_several_values_is_checked():
    assert message(Several, sizes=(3, 0, -1)) == "several.sizes must be above 0, got 0"
    assert message(Several, shares=(0.5, 1.5)).startswith("several.shares must be in [0, 1], got")
    assert Several(sizes=(1, 2), shares=(0.0, 1.0)).sizes == (1, 2)
    assert Several(shares=()).shares == ()


def test_a_least_number_of_values():
    assert message(Several, sizes=()) == "several.sizes must name at least one"
    assert message(Several, names=()) == "several.names must name at least one"
    assert message(Several, pair=(1.0,)) == "several.pair must name at least 2"
    assert Several(names=("a", "b"), pair=(1.0, 2.0)).names == ("a", "b")


def test_nested_and_inherited_ranges():
    """A nested dataclass checks itself; a subclass checks the fields that it inherits."""
    module = __name__.rpartition(".")[2]
    assert message(Inner, lr=0) == f"{module}.lr must be above 0, got 0"
    assert message(Outer, lr=0) == "outer.lr must be above 0, got 0"
    assert message(Outer, steps=0) == "outer.steps must be above 0, got 0"
    assert Outer(inner=Inner(lr=0.5)).inner.lr == 0.5


@pytest.mark.parametrize(
    "cls, name",
    [
        (Train, "train.lr"),
        (Augment, "augment.crop"),
        (Unlearn, "unlearn.lr"),
        (Recover, "recover.lr"),
        (Prune, "prune.max_fraction"),
        (BadNets, "badnets.poison_rate"),
    ],
)
def test_messages_name_the_section(cls, name):
    """It is the name of the module, unless the class declares another."""
    field = name.partition(".")[2]
    assert message(cls, **{field: -1}).startswith(f"{name} must be ")


@pytest.mark.parametrize(
    "constraint, words",
    [
        (Gt(0), "above 0"),
        (Gt(-1), "above -1"),
        (Ge(0), "0 or more"),
        (Ge(1), "at least 1"),
        (Lt(1), "below 1"),
        (Le(0.5), "at most 0.5"),
        (Interval(gt=0, lt=1), "in (0, 1)"),
        (Interval(ge=0, le=1), "in [0, 1]"),
        (Interval(ge=0.5, lt=2), "in [0.5, 2)"),
        (Interval(gt=1, le=4), "in (1, 4]"),
        (Interval(ge=2, le=4), "from 2 to 4"),
    ],
)
def test_bounds_in_words(constraint, words):
    assert describe(bounds_of(constraints_of(Annotated[float, constraint, "text"]))) == words


def test_constraints_of_an_annotation():
    hint = Annotated[float, Interval(gt=0, le=1), "text", MinLen(1)]
    assert list(constraints_of(hint)) == [Gt(0), Le(1), MinLen(1)]
    assert bounds_of(constraints_of(hint)) == {"gt": 0, "le": 1}
    assert list(constraints_of(float)) == [] and list(constraints_of(None)) == []
    assert unwrap(hint) is float and unwrap(int) is int
