"""Name the methods, data sets, architectures and presets."""

from __future__ import annotations

import json

import click

from rnp.models.names import ARCHITECTURES, TORCHVISION
from rnp.params.presets import presets
from rnp.registry import names

TITLES = {
    "attacks": lambda: names("attack"),
    "defenses": lambda: ["rnp", *names("defense")],
    "trigger_detectors": lambda: names("triggers"),
    "label_detectors": lambda: names("labels"),
    "sample_detectors": lambda: names("samples"),
    "datasets": lambda: names("dataset"),
    "architectures": lambda: [*ARCHITECTURES, f"{TORCHVISION}NAME"],
    "presets": presets,
}


@click.command("list")
@click.option("--json", "as_json", is_flag=True, help="print JSON")
def list_(as_json: bool) -> None:
    """Name the attacks, defenses, detectors, data sets, architectures and presets."""
    found = {title: make() for title, make in TITLES.items()}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for title, members in found.items():
        click.echo(f"{title.replace('_', ' ') + ':':20}{', '.join(members)}")
