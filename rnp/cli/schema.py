"""Print the JSON Schema of params.yaml."""

from __future__ import annotations

import json
from pathlib import Path

import click

from rnp.io.files import write_json
from rnp.params.schema import json_schema


@click.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), help="write it to this file instead")
def schema(out: Path | None) -> None:
    """Print the JSON Schema of params.yaml, by which an editor completes and checks its keys."""
    if out:
        write_json(out, json_schema())
    else:
        click.echo(json.dumps(json_schema(), indent=2))
