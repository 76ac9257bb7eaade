"""Print a complete, commented params.yaml: every option of every command, with the values of the
preset.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from rnp.cli.check import leaves, read_params, sections
from rnp.errors import UserError
from rnp.registry import suggest

FOLDER = Path(__file__).parent.parent / "presets"


def presets() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def render(name: str) -> str:
    """The text of params.yaml: the preset's own opening comment, then all keys; those that it does
    not set have defaults.

    Raises: UserError when there is no such preset.
    """
    from rnp.cli.options import fields

    if name not in presets():
        raise UserError(f"unknown preset {name!r}{suggest(name, presets())}")
    file = FOLDER / f"{name}.yaml"
    own = read_params(file)
    opening = [line for line in file.read_text().splitlines() if line.startswith("#")]
    lines = [*opening, "", f"preset: {name}", f"seed: {own.pop('seed', 0)}"]
    for section, classes in sections().items():
        given = own.pop(section, {})
        lines += ["", f"{section}:"]
        wanted = dict(leaves(given))
        path: list[str] = []
        for cls, prefix in classes:
            if section == "defences" and prefix.rstrip(".") not in given:
                continue
            if prefix and not list(fields(cls, prefix)):
                lines.append(f"  {prefix.rstrip('.')}: {{}}")
            for key, _, text, default in fields(cls, prefix):
                *parents, leaf = key.split(".")
                for depth, parent in enumerate(parents):
                    if path[: depth + 1] != parents[: depth + 1]:
                        lines.append(f"{'  ' * (depth + 1)}{parent}:")
                path = parents
                entry = f"{'  ' * (len(parents) + 1)}{leaf}: {write(wanted.pop(key, default))}"
                lines.append(f"{entry:<38}  # {text}" if text else entry)
        if wanted:
            raise UserError(f"preset {name}: no option {section}.{next(iter(wanted))}")
    if own:
        raise UserError(f"preset {name}: no section {next(iter(own))}")
    return "\n".join(lines) + "\n"


def write(value: object) -> str:
    """One value as both YAML 1.1 and 1.2 read it."""
    if isinstance(value, float):
        text = f"{value:.6g}"
        if "e" in text:
            mantissa, exponent = text.split("e")
            return f"{mantissa}{'' if '.' in mantissa else '.0'}e{int(exponent):+d}"
        return text if "." in text else f"{text}.0"
    return json.dumps(list(value) if isinstance(value, tuple) else value)


@click.command()
@click.argument("name")
def preset(name: str) -> None:
    """Print the params.yaml of the preset NAME; `rnp list` names them."""
    click.echo(render(name), nl=False)
