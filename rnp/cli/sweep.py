"""Run a grid of configurations, each in its own copy of this checkout, by processes of this
machine or by Ray.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import shutil
import sys
from pathlib import Path

import click

from rnp.errors import UserError
from rnp.sweep.grid import PARAMS, grid
from rnp.sweep.run import (
    check_rows_differ,
    exclusive_folder,
    interruptible,
    lines,
    put_row,
    run_environment,
)
from rnp.sweep.runners import Job, Outcome, by_ray, locally
from rnp.sweep.workspace import Configuration, Snapshot


@click.command()
@click.option(
    "-S",
    "--set-param",
    "overrides",
    multiple=True,
    required=True,
    metavar="KEY=VALUES",
    help=(
        "values of one parameter, as `dvc exp run --queue` takes them: a,b or"
        " range(start,stop,step)"
    ),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="sweeps",
    show_default=True,
    help="folder for a copy of the checkout and a log per configuration",
)
@click.option("--target", default="", help="the stage to run up to; without it the whole pipeline")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="configurations at a time",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads of each; without it the cores divided by --workers",
)
@click.option(
    "--table",
    type=click.Path(path_type=Path, dir_okay=False),
    help="put a row of each into this CSV, as `rnp rows` does",
)
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="let Ray place them, on the cluster of RAY_ADDRESS or on this machine",
)
@click.option(
    "--gpus",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="with --ray, GPUs of each; may be a fraction",
)
def sweep(
    overrides: tuple[str, ...],
    out: Path,
    target: str,
    workers: int,
    threads: int | None,
    table: Path | None,
    on_ray: bool,
    gpus: float,
) -> None:
    """Run `dvc repro` for every combination of parameters.

    Each runs in OUT/NAME, a copy of the files that git tracks with its own params.yaml, and shares
    the DVC cache of this folder: a stage that several have in common runs once. The same command
    again skips what has finished and goes on with the rest. What fails is tried once more. The
    last bits of a model depend on --threads.
    """
    root, out, table = Path.cwd(), out.absolute(), table and table.absolute()
    if not (root / ".dvc").is_dir():
        raise UserError(f"{root} holds no .dvc folder; run `rnp sweep` where dvc.yaml is")
    texts = grid(overrides, root / PARAMS)
    threads = threads or max(1, (os.cpu_count() or 1) // workers)
    engine = functools.partial(by_ray, threads=threads, gpus=gpus) if on_ray else locally
    with exclusive_folder(out), interruptible():
        snapshot = Snapshot.take(root, without=table)
        configurations = [
            Configuration(name=name, folder=out / name, params=text, key=snapshot.key(text, target))
            for name, text in texts.items()
        ]
        before = {
            each: Outcome(each.recall()["seconds"]) for each in configurations if each.finished
        }
        todo = [each for each in configurations if each not in before]
        for each in todo:
            each.copy(snapshot)
        if table:
            check_rows_differ(configurations)
        job = Job(locks=out / ".locks", target=target, env=run_environment(root, threads))
        job.locks.mkdir(exist_ok=True)
        click.echo(
            f"{len(todo)} of {len(configurations)} configurations to run, {workers} at a time,"
            f" {threads} threads each"
        )
        rows = {}
        with contextlib.closing(engine(job, todo, workers=workers)) as ended:
            for each, outcome in itertools.chain(before.items(), ended):
                state = (
                    "failed"
                    if outcome.reason
                    else "finished before"
                    if each in before
                    else "finished"
                )
                reason = outcome.reason or (put_row(table, each, job.env) if table else "")
                rows[each.name] = (each.name, state, f"{outcome.seconds:.0f}", reason)
                click.echo("  ".join(rows[each.name]).rstrip())
        shutil.rmtree(job.locks)
    click.echo("")
    for line in lines(
        [("configuration", "state", "seconds", "reason"), *(rows[name] for name in texts)]
    ):
        click.echo(line)
    if any(reason for *_, reason in rows.values()):
        sys.exit(1)
