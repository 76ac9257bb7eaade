"""Repair a stranger's model with a folder of clean images."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import click

from rnp.cli.options import options
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.params.fields import build_from_values
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.unlearn import Unlearn
from rnp.untrusted.audit import PRUNE, RECOVER, ROUNDS, SEARCH, UNLEARN, summary
from rnp.untrusted.audit import purify as repair
from rnp.untrusted.limits import sanitize
from rnp.untrusted.spec import ModelSpec


def about_the_subject(function: Callable) -> Callable:
    """The arguments and options of every command about a stranger's model."""
    for decorate in (
        options(NeuralCleanse, "search.", SEARCH),
        options(Unlearn, "unlearn.", UNLEARN),
        options(ModelSpec),
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="where all random numbers come from",
        ),
        click.option(
            "--clean",
            required=True,
            help=(
                "clean images: a folder with a folder per class, a folder of images, a .csv or"
                " .parquet of path and label, torchvision:NAME, or a defense set of the pipeline"
            ),
        ),
        click.argument("model", type=click.Path(path_type=Path)),
    ):
        function = decorate(function)
    return function


mlflow_too = click.option("--mlflow/--no-mlflow", default=False, help="keep a run in MLflow too")


def typed_command() -> str:
    return shlex.join(["rnp", *sys.argv[1:]])


@click.command()
@options(Prune, "prune.", PRUNE)
@options(Recover, "recover.", RECOVER)
@click.option(
    "--rounds",
    type=int,
    default=ROUNDS,
    show_default=True,
    help="of tuning against triggers that pruning leaves open, at most; 0: pruning alone",
)
@mlflow_too
@about_the_subject
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="folder for the repaired model and the report",
)
def purify(
    model: Path, clean: str, out: Path, seed: int, mlflow: bool, rounds: int, **values: object
) -> None:
    """Repair MODEL with clean images alone: unlearn, recover, prune, then tune where a small
    trigger is left open.

    OUT gets purified.safetensors, report.html, report.json, modelcard.md and masks.csv. MODEL
    itself is opened once, as `rnp convert` does, and never changed.
    """
    parts = {
        name: build_from_values(cls, values, f"{name}.")
        for name, cls in (
            ("unlearn", Unlearn),
            ("recover", Recover),
            ("prune", Prune),
            ("search", NeuralCleanse),
        )
    }
    result = repair(
        model,
        clean,
        out,
        subject=build_from_values(ModelSpec, values),
        seed=seed,
        rounds=rounds,
        mlflow=mlflow,
        command=typed_command(),
        **parts,
    )
    for line in [
        *summary(result),
        (
            f"{out / 'purified.safetensors'}, and {out / 'report.html'}, which says what was not"
            " tested"
        ),
    ]:
        click.echo(sanitize(line))
