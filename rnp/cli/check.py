"""Check params.yaml."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.params.read import read_params
from rnp.params.schema import check_params


@click.command()
@click.argument("params", type=click.Path(path_type=Path), default="params.yaml")
def check(params: Path) -> None:
    """Check PARAMS (params.yaml) and say what is wrong with it, or nothing."""
    check_params(read_params(params))
