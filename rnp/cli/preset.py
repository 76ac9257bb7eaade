"""Print a complete, commented params.yaml."""

from __future__ import annotations

import click

from rnp.params.presets import render


@click.command()
@click.argument("name")
def preset(name: str) -> None:
    """Print the params.yaml of the preset NAME; `rnp list` names them."""
    click.echo(render(name), nl=False)
