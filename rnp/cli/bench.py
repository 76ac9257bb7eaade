"""Measure speed and memory of everything on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from rnp.errors import UserError

ROOT = Path(__file__).parents[2]
PARTS = "start, train, waiting, poison, rnp, defenses, detectors, demo, noop, scaling"
FILE = click.Path(path_type=Path)


@click.command()
@click.option("--only", multiple=True, help=f"a part: {PARTS}; all without it")
@click.option(
    "--repeats", type=int, default=3, help="of each measurement that takes less than a minute"
)
@click.option(
    "--run",
    "subject",
    type=click.Path(path_type=Path, exists=True),
    help="folder of a finished pipeline whose model and images to use; without it demo is trained",
)
@click.option(
    "--quick",
    is_flag=True,
    help="rnp: extrapolate the published procedure from one epoch and one evaluation",
)
@click.option("--json", "raw", type=FILE, default="results/bench.json", help="raw numbers")
@click.option("--page", type=FILE, default="results/bench.md", help="tables of them")
@click.option("--plot", type=FILE, default="docs/scaling.png", help="figure of the part scaling")
def bench(**options: Any) -> None:
    """Measure speed and memory; a part that runs again replaces its older numbers in the files."""
    sys.path.append(str(ROOT))  # where the console script does not look
    try:
        from benchmarks.suite import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "benchmarks":
            raise
        raise UserError(
            "rnp bench needs a checkout of the repository, which holds benchmarks/; clone it and"
            " run it there"
        ) from error
    failed = run(**options)
    if failed:
        raise click.ClickException(f"these failed: {', '.join(failed)}")
