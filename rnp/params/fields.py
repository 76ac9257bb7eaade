"""The hyperparameters of a dataclass: name, type, range, help text and default of each field."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

import click

from rnp.params.ranges import bounds_of, constraints_of, describe, unwrap

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Hyperparameter:
    """A field of a dataclass; those of a nested one have its name and a dot before theirs.

    `type` has no `Annotated` round it, `bounds` are those of the value, or of each of several.
    """

    name: str
    type: Any
    text: str
    default: Any
    bounds: dict[str, float]

    @property
    def argument(self) -> str:
        """The name under which click hands the value on."""
        return argument(self.name)

    @property
    def help(self) -> str:
        """The help text, with the range where there is one."""
        return f"{self.text} ({describe(self.bounds)})" if self.bounds else self.text


def iter_hyperparameters(
    cls: type, prefix: str = "", like: object = None
) -> Iterator[Hyperparameter]:
    """Each hyperparameter of `cls`, those of nested dataclasses in their place.

    Defaults are those of `like`, an instance of `cls`, if it is given.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kind = unwrap(hint)
        default = default_of(field) if like is None else getattr(like, field.name)
        name = f"{prefix}{field.name}"
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from iter_hyperparameters(kind, f"{name}.", default)
            continue
        bounds = bounds_of(constraints_of(hint))
        if typing.get_origin(kind) is tuple:
            element = typing.get_args(kind)[0]
            bounds |= bounds_of(constraints_of(element))
            kind = tuple[unwrap(element), ...]
        texts = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, str)]
        yield Hyperparameter(name, kind, "".join(texts), default, bounds)


def default_of(field: dataclasses.Field) -> object:
    """The default of a field, made where it has a factory."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def argument(name: str) -> str:
    """The name under which click hands the value of `name` on."""
    return name.replace(".", "__")


def build_from_values(cls: type[T], values: dict[str, Any], prefix: str = "") -> T:
    """An instance of `cls` from the values that click collected; they are removed from `values`.

    Raises: UserError when a value is out of range.
    """
    given = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        name = f"{prefix}{field.name}"
        nested = dataclasses.is_dataclass(hints[field.name])
        given[field.name] = (
            build_from_values(hints[field.name], values, f"{name}.")
            if nested
            else values.pop(argument(name))
        )
    return cls(**given)


def from_section(cls: type[T], section: dict[str, Any], prefix: str = "") -> T:
    """An instance of `cls` from the leaves of a section of params.yaml, by key.

    What the section lacks has its default.
    """
    values = {}
    for each in iter_hyperparameters(cls, prefix):
        value = section.get(each.name, each.default)
        values[each.argument] = tuple(value) if isinstance(value, list) else value
    return build_from_values(cls, values, prefix)


def click_settings(kind: object) -> dict[str, Any]:
    """How click takes a value of this type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return {"type": click.Choice(args)}
    if origin is tuple:
        return {"type": args[0], "multiple": True}
    if kind in (int, float, str, bool):
        return {"type": kind}
    raise TypeError(f"no option for the annotation {kind!r}")
