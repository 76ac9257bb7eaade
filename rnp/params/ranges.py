"""Ranges of hyperparameters: declared in the annotation of a field, checked in one place."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator

from annotated_types import BaseMetadata, Ge, GroupedMetadata, Gt, Le, Lt, MinLen

from rnp.errors import UserError

BOUNDS = {Gt: "gt", Ge: "ge", Lt: "lt", Le: "le"}


class Hyperparameters:
    """The root of frozen dataclasses whose fields are hyperparameters.

    A field declares its range beside its help text: `lr: Annotated[float, Gt(0), "step size"]`.

    Raises: UserError from the constructor, for the first value out of range.
    """

    section: typing.ClassVar[str] = ""
    """The name before the dot in messages; empty takes the name of the module."""

    def __post_init__(self) -> None:
        cls = type(self)
        section = cls.section or cls.__module__.rpartition(".")[2]
        for name, rule in _rules(cls).items():
            value = getattr(self, name)
            if rule.min_length and len(value) < rule.min_length:
                number = "one" if rule.min_length == 1 else rule.min_length
                raise UserError(f"{section}.{name} must name at least {number}")
            for number in (value if rule.several else (value,)) if rule.bounds else ():
                _check(f"{section}.{name}", number, rule.bounds)


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a field may hold: `bounds` are those of its value, or of each of `several`."""

    bounds: dict[str, float]
    min_length: int
    several: bool


@functools.cache
def _rules(cls: type) -> dict[str, Rule]:
    """The rules of the fields that have any."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rules = {}
    for field in dataclasses.fields(typing.cast(typing.Any, cls)):
        hint = hints[field.name]
        kind = unwrap(hint)
        several = typing.get_origin(kind) is tuple
        element = typing.get_args(kind)[0] if several else None
        constraints = [*constraints_of(hint), *constraints_of(element)]
        lengths = [each.min_length for each in constraints if isinstance(each, MinLen)]
        if constraints:
            rules[field.name] = Rule(bounds_of(constraints), max(lengths, default=0), several)
    return rules


def constraints_of(hint: object) -> Iterator[BaseMetadata]:
    """The constraints in an `Annotated`; an interval is those of its two ends."""
    for metadata in getattr(hint, "__metadata__", ()):
        if isinstance(metadata, GroupedMetadata):
            yield from (part for part in metadata if isinstance(part, BaseMetadata))
        elif isinstance(metadata, BaseMetadata):
            yield metadata


def unwrap(hint: object) -> object:
    """The type inside an `Annotated`, or `hint` itself."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _check(where: str, value: float, bounds: dict[str, float]) -> None:
    if _within(value, bounds):
        return
    hint = ""
    is_fraction = bounds.get("le", bounds.get("lt")) == 1
    if is_fraction and value > 1 and _within(value / 100, bounds):
        hint = f"; it is a fraction, not percent: did you mean {value / 100:g}?"
    raise UserError(f"{where} must be {describe(bounds)}, got {value:g}{hint}")


def bounds_of(constraints: Iterable[BaseMetadata]) -> dict[str, float]:
    """The bounds by the names `gt`, `ge`, `lt`, `le`."""
    return {
        name: getattr(constraint, name)
        for constraint in constraints
        for kind, name in BOUNDS.items()
        if isinstance(constraint, kind)
    }


def _within(value: float, bounds: dict[str, float]) -> bool:
    """False for NaN, which is within no bounds."""
    return (
        (value > bounds["gt"] if "gt" in bounds else True)
        and (value >= bounds["ge"] if "ge" in bounds else True)
        and (value < bounds["lt"] if "lt" in bounds else True)
        and (value <= bounds["le"] if "le" in bounds else True)
    )


def describe(bounds: dict[str, float]) -> str:
    """The bounds in words: `above 0`, `in (0, 1]`, `from 2 to 4`."""
    low, high = bounds.get("gt", bounds.get("ge")), bounds.get("lt", bounds.get("le"))
    if low is not None and high is not None:
        if "ge" in bounds and "le" in bounds and high > 1:
            return f"from {low:g} to {high:g}"
        left, right = "(" if "gt" in bounds else "[", ")" if "lt" in bounds else "]"
        return f"in {left}{low:g}, {high:g}{right}"
    if low is None:
        return f"below {high:g}" if "lt" in bounds else f"at most {high:g}"
    if "gt" in bounds:
        return f"above {low:g}"
    return "0 or more" if low == 0 else f"at least {low:g}"
