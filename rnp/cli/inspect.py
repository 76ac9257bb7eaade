"""Look at a stranger's model with a folder of clean images; nothing is changed."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.cli.purify import about_the_subject, mlflow_too, typed_command
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.params.fields import build_from_values
from rnp.unlearn import Unlearn
from rnp.untrusted.audit import inspect as examine
from rnp.untrusted.audit import summary
from rnp.untrusted.limits import sanitize
from rnp.untrusted.spec import ModelSpec


@click.command()
@mlflow_too
@about_the_subject
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, file_okay=False), help="folder for a report"
)
def inspect(
    model: Path, clean: str, out: Path | None, seed: int, mlflow: bool, **values: object
) -> None:
    """Say what MODEL does on clean images, to which label it drifts while it unlearns, and how
    small a trigger it yields to.
    """
    parts = {
        name: build_from_values(cls, values, f"{name}.")
        for name, cls in (("unlearn", Unlearn), ("search", NeuralCleanse))
    }
    result = examine(
        model,
        clean,
        out,
        subject=build_from_values(ModelSpec, values),
        seed=seed,
        mlflow=mlflow,
        command=typed_command(),
        **parts,
    )
    for line in summary(result):
        click.echo(sanitize(line))
