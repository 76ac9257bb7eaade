"""Presets: complete, commented params.yaml files, every option with the value of the preset."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rnp.errors import UserError
from rnp.params.fields import iter_hyperparameters
from rnp.params.read import flatten, read_params
from rnp.registry import suggest

FOLDER = Path(__file__).parent.parent / "presets"
SCHEMA = Path(".rnp/params.schema.json")
"""Where `rnp setup` puts the schema, from the folder of params.yaml."""


def presets() -> list[str]:
    """The names of the presets, sorted."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def render(name: str) -> str:
    """The text of params.yaml: the preset's opening comment, then all keys.

    Keys that the preset does not set have their defaults.

    Raises: UserError when there is no such preset.
    """
    from rnp.params.schema import find_sections

    if name not in presets():
        raise UserError(f"unknown preset {name!r}{suggest(name, presets())}")
    file = FOLDER / f"{name}.yaml"
    own = read_params(file)
    opening = [line for line in file.read_text().splitlines() if line.startswith("#")]
    lines = [f"# yaml-language-server: $schema={SCHEMA}", *opening, "", f"preset: {name}"]
    lines += [
        f"{key}: {own.pop(key, default)}" for key, default in (("seed", 0), ("precision", "auto"))
    ]
    for section, members in find_sections().items():
        given = own.pop(section, {})
        if section == "defenses":
            members = [(cls, prefix) for cls, prefix in members if prefix.rstrip(".") in given]
        wanted = dict(flatten(given))
        lines += ["", f"{section}:", *section_lines(members, wanted)]
        if wanted:
            raise UserError(f"preset {name}: no option {section}.{next(iter(wanted))}")
    if own:
        raise UserError(f"preset {name}: no section {next(iter(own))}")
    return "\n".join(lines) + "\n"


def section_lines(members: list[tuple[type, str]], wanted: dict[str, object]) -> Iterator[str]:
    """One line per key, with its help text; values are taken out of `wanted`."""
    path: list[str] = []
    for cls, prefix in members:
        keys = list(iter_hyperparameters(cls, prefix))
        if prefix and not keys:
            yield f"  {prefix.rstrip('.')}: {{}}"
        for key in keys:
            *parents, leaf = key.name.split(".")
            for depth, parent in enumerate(parents):
                if path[: depth + 1] != parents[: depth + 1]:
                    yield f"{'  ' * (depth + 1)}{parent}:"
            path = parents
            value = write(wanted.pop(key.name, key.default))
            entry = f"{'  ' * (len(parents) + 1)}{leaf}: {value}"
            yield f"{entry:<38}  # {key.help}" if key.text else entry


def write(value: object) -> str:
    """One value as both YAML 1.1 and 1.2 read it."""
    if not isinstance(value, float):
        return json.dumps(list(value) if isinstance(value, tuple) else value)
    text = f"{value:.6g}"
    if "e" in text:
        mantissa, exponent = text.split("e")
        return f"{mantissa}{'' if '.' in mantissa else '.0'}e{int(exponent):+d}"
    return text if "." in text else f"{text}.0"
