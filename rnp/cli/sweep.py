"""Run a grid of configurations, several at a time."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import click

from rnp.sweep.run import SweepSettings, aligned, open_sweep


@click.command()
@click.option(
    "-S",
    "--set-param",
    "overrides",
    multiple=True,
    required=True,
    metavar="KEY=VALUES",
    help="values of one parameter, as for `dvc exp run --queue`: a,b or range(start,stop,step)",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="sweeps",
    help="folder for a copy of the checkout and a log per configuration",
)
@click.option("--target", default="", help="the stage to run up to; without it the whole pipeline")
@click.option("--workers", type=click.IntRange(min=1), default=2, help="configurations at a time")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads of each; without it the cores divided by --workers",
)
@click.option(
    "--table",
    type=click.Path(path_type=Path, dir_okay=False),
    help="add a row of each to this CSV file, as `rnp collect` does",
)
@click.option(
    "--ray", is_flag=True, help="let Ray place them, on the cluster of RAY_ADDRESS or locally"
)
@click.option(
    "--gpus",
    type=click.FloatRange(min=0),
    default=0.0,
    help="with --ray, GPUs of each; may be a fraction",
)
def sweep(
    overrides: tuple[str, ...],
    out: Path,
    target: str,
    workers: int,
    threads: int | None,
    table: Path | None,
    ray: bool,
    gpus: float,
) -> None:
    """Run `dvc repro` for every combination of parameters.

    Each configuration runs in OUT/NAME, a copy of the files that git tracks with its own
    params.yaml. The copies share the DVC cache of this folder: a stage that several have in common
    runs once. The same command again skips what has finished and continues with the rest. What
    fails is tried once more. The last bits of a model depend on --threads.
    """
    settings = SweepSettings(
        root=Path.cwd(),
        out=out.absolute(),
        overrides=overrides,
        target=target,
        workers=workers,
        threads=threads or max(1, (os.cpu_count() or 1) // workers),
        table=table and table.absolute(),
        ray=ray,
        gpus=gpus,
    )
    rows = {}
    with open_sweep(settings) as opened, contextlib.closing(opened.run()) as results:
        click.echo(
            f"{len(opened.todo)} of {len(opened.configurations)} configurations to run,"
            f" {workers} at a time, {settings.threads} threads each"
        )
        for result in results:
            rows[result.name] = result.cells()
            click.echo("  ".join(result.cells()).rstrip())
    click.echo("")
    names = [configuration.name for configuration in opened.configurations]
    head = ("configuration", "state", "seconds", "reason")
    for line in aligned([head, *(rows[name] for name in names)]):
        click.echo(line)
    if any(reason for *_, reason in rows.values()):
        sys.exit(1)
