"""The sections of params.yaml: what each may hold, and a check of a whole file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin

import click
import pydantic

from rnp.errors import UserError
from rnp.params.choices import ChooseAttack, ChooseSet
from rnp.params.fields import (
    Hyperparameter,
    argument,
    build_from_values,
    click_settings,
    iter_hyperparameters,
)
from rnp.params.read import flatten
from rnp.registry import load, names, suggest
from rnp.training.device import Precision

Members = list[tuple[type, str]]
"""Classes whose fields are the keys of a section, with their prefixes."""
TOP_LEVEL = {
    "preset": (str, "the preset that this file was made from; a name for its rows"),
    "seed": (int, "random seed of everything"),
    "precision": (Precision, "arithmetic; auto takes bf16 where the hardware has it"),
}
OPEN = ("defenses",)
"""Sections that hold those of their members that are wanted, not all of them."""


def find_sections() -> dict[str, Members]:
    """Each section of params.yaml with the classes whose fields are its keys."""
    from rnp.data.base import Split
    from rnp.detection.run import Detect, detectors
    from rnp.evaluation.controls import Controls
    from rnp.evaluation.oracle import Evaluate
    from rnp.models.build import Architecture
    from rnp.prune import Prune
    from rnp.recover import Recover
    from rnp.training.recipe import Train
    from rnp.unlearn import Unlearn

    def family(name: str) -> Members:
        return [(load(name, method), f"{method}.") for method in names(name)]

    return {
        "data": [(ChooseSet, ""), (Split, "")],
        "datasets": family("dataset"),
        "model": [(Architecture, "")],
        "train": [(Train, "")],
        "poison": [(ChooseAttack, "")],
        "attacks": family("attack"),
        "unlearn": [(Unlearn, "")],
        "recover": [(Recover, "")],
        "prune": [(Prune, "")],
        "defenses": family("defense"),
        "detect": [(Detect, ""), *detectors()],
        "controls": [(Controls, "")],
        "evaluate": [(Evaluate, "")],
    }


def check_params(params: dict) -> dict:
    """The parameters with every key, each as its option takes it.

    Raises: UserError naming the first key or value that no command takes.
    """
    known = find_sections()
    for section in params:
        if section not in TOP_LEVEL and section not in known:
            suggestion = suggest(section, [*TOP_LEVEL, *known])
            raise UserError(f"params.yaml: unknown section {section!r}{suggestion}")
    complete = dict(params) | check_top_level(params)
    for section, members in known.items():
        if not isinstance(params.get(section), dict):
            raise UserError(
                f"params.yaml: section {section!r} is missing; `rnp preset demo` prints a complete"
                " file"
            )
        complete[section] = check_section(section, members, params[section])
    if "rnp" in params["defenses"]:
        raise UserError(
            "params.yaml: defenses.rnp is not needed: the stages unlearn, recover and prune are"
            " RNP; take it out"
        )
    defenses = set(params["defenses"])
    evaluated = set(params["evaluate"].get("defenses", []))
    if defenses != evaluated:
        raise UserError(
            f"params.yaml: evaluate.defenses names {sorted(evaluated)}, but the sections under"
            f" defenses are {sorted(defenses)}; make them agree"
        )
    return complete


def check_top_level(params: dict) -> dict:
    """The keys that stand outside of sections.

    Raises: UserError when the seed is no whole number, or the precision none of those known.
    """
    seed = params.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise UserError(f"params.yaml: seed must be a whole number, got {seed!r}")
    precision = params.get("precision", "auto")
    if precision not in get_args(Precision):
        suggestion = suggest(str(precision), list(get_args(Precision)))
        raise UserError(f"params.yaml: unknown precision {precision!r}{suggestion}")
    return {"seed": seed, "precision": precision}


def check_section(section: str, members: Members, given: dict) -> dict:
    """A section with every key; of an open one those of the members that it names."""
    if section in OPEN:
        known = [prefix.rstrip(".") for _, prefix in members]
        for name in given:
            if name not in known:
                raise UserError(f"params.yaml: unknown key {section}.{name}{suggest(name, known)}")
        members = [(cls, prefix) for cls, prefix in members if prefix.rstrip(".") in given]
    keys = {
        each.name: each for cls, prefix in members for each in iter_hyperparameters(cls, prefix)
    }
    values = {each.argument: each.default for each in keys.values()}
    for key, value in flatten(given):
        if key not in keys:
            raise UserError(f"params.yaml: unknown key {section}.{key}{suggest(key, list(keys))}")
        values[argument(key)] = coerce(f"{section}.{key}", value, keys[key])
    complete = {key: values[argument(key)] for key in keys}
    for cls, prefix in members:
        try:
            build_from_values(cls, values, prefix)
        except UserError as error:
            raise UserError(f"params.yaml: {section}: {error}") from None
    return nest(complete) | empty_members(members)


def empty_members(members: Members) -> dict[str, dict]:
    """The members without hyperparameters, which no key shows."""
    return {
        prefix.rstrip("."): {}
        for cls, prefix in members
        if prefix and not any(iter_hyperparameters(cls))
    }


def nest(leaves: Mapping[str, object]) -> dict:
    """What `flatten` makes these leaves of."""
    tree: dict = {}
    for key, value in leaves.items():
        *parents, last = key.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree


def coerce(key: str, value: Any, wanted: Hyperparameter) -> object:
    """`value` as the option takes it.

    Raises: UserError when it has another type.
    """
    settings = click_settings(wanted.type)
    several, kind = settings.get("multiple", False), settings["type"]
    if several != isinstance(value, list | tuple):
        expected = "a list" if several else "one value"
        raise UserError(f"params.yaml: {key} must be {expected}, got {value!r}")
    if kind is not bool and (isinstance(value, bool) or value is None):
        expected = getattr(kind, "__name__", "one of its choices")
        raise UserError(f"params.yaml: {key} must be {expected}, got {value!r}")
    convert = click.types.convert_type(kind).convert
    try:
        if several:
            return tuple(convert(each, None, None) for each in value)
        return convert(value, None, None)
    except click.UsageError as error:
        raise UserError(f"params.yaml: {key}: {error.message}") from None


def json_schema() -> dict:
    """The JSON Schema of params.yaml, by which an editor completes and checks its keys."""
    properties = {
        name: pydantic.TypeAdapter(kind).json_schema() | {"description": text}
        for name, (kind, text) in TOP_LEVEL.items()
    }
    for section, members in find_sections().items():
        leaves = {
            each.name: each for cls, prefix in members for each in iter_hyperparameters(cls, prefix)
        }
        properties[section] = describe_branch(nest(leaves) | empty_members(members))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | branch_of(properties)


def describe_branch(tree: dict) -> dict:
    """The schema of nested dictionaries of hyperparameters."""
    return branch_of(
        {
            key: describe_branch(value) if isinstance(value, dict) else describe_leaf(value)
            for key, value in tree.items()
        }
    )


def branch_of(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def describe_leaf(key: Hyperparameter) -> dict:
    """Type, range, default and help text of one key."""
    element = get_args(key.type)[0] if get_origin(key.type) is tuple else None
    bounds: dict[str, Any] = dict(key.bounds)
    bounded = Annotated[element or key.type, pydantic.Field(**bounds)]
    kind: Any = tuple[bounded, ...] if element else bounded
    default = list(key.default) if isinstance(key.default, tuple) else key.default
    schema = pydantic.TypeAdapter(kind).json_schema()
    return schema | {"default": default, "description": key.help}
