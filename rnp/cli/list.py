"""List the methods, data sets, architectures and presets."""

from __future__ import annotations

import json

import click

from rnp.models.names import ARCHITECTURES, TORCHVISION
from rnp.params.presets import presets
from rnp.registry import names

TITLES = {
    "attacks": lambda: names("attack"),
    "defenses": lambda: names("defense"),
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
    """List the attacks, defenses, detectors, data sets, architectures and presets."""
    members = {title: list_members() for title, list_members in TITLES.items()}
    if as_json:
        click.echo(json.dumps(members, indent=2))
        return
    for title, names_of_title in members.items():
        click.echo(f"{title.replace('_', ' ') + ':':20}{', '.join(names_of_title)}")
