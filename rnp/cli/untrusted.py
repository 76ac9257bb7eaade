"""What the commands on untrusted models have in common: MODEL, --clean and the facts about both."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from rnp.cli.help import OTHERS, GroupedCommand
from rnp.cli.options import PRECISION, SEED, options
from rnp.params.fields import build_from_values
from rnp.training.device import use_precision
from rnp.untrusted.case import AuditCase, load_case
from rnp.untrusted.limits import sanitize
from rnp.untrusted.spec import ModelSpec

CLEAN = click.option(
    "--clean",
    required=True,
    metavar="IMAGES",
    help="clean images: a folder with a folder per class, a folder of images, a .csv or .parquet"
    " file of path and label, torchvision:NAME, or a defense set of `rnp prepare`",
)
MLFLOW = click.option("--mlflow/--no-mlflow", default=False, help="log a run to MLflow too")
HEADINGS = {
    "Model and images": (
        "arch",
        "mean",
        "std",
        "image-size",
        "class-names",
        "max-images",
        "width",
        "pseudo-label-confidence",
    ),
    "Options": OTHERS,
    "Unlearning": ("unlearn.",),
    "Recovery of masks": ("recover.",),
    "Pruning": ("prune.",),
    "Recovery of triggers": ("search.",),
}
ARGUMENTS = {"model": "a checkpoint: .pt, .pth, .ckpt, .bin or .safetensors; nothing in it is run"}


@dataclass(frozen=True)
class Source:
    """The model and the images that the user names."""

    model: Path
    clean: str
    spec: ModelSpec
    seed: int

    def load(self) -> AuditCase:
        """Load both, after a warning on stderr for each problem with them."""
        case = load_case(self.model, self.clean, spec=self.spec, seed=self.seed)
        for warning in case.warnings:
            warn(warning)
        return case


def warn(message: str) -> None:
    click.echo(sanitize(f"warning: {message}"), err=True)


def untrusted_command(
    *parts: tuple[type, str, object],
    headings: dict[str, Sequence[str]] = {},  # noqa: B006  never changed
    arguments: dict[str, str] = {},  # noqa: B006
) -> Callable[[Callable[..., None]], click.Command]:
    """A command on an untrusted model.

    The function is called with a `Source`, an instance of each class in `parts`, and the values of
    its own options. A part is a class, the prefix of its options, and an instance whose values
    are the defaults, or None.
    """

    def decorate(function: Callable[..., None]) -> click.Command:
        @functools.wraps(function)
        def run(model: Path, clean: str, seed: int, precision: Any, **values: Any) -> None:
            source = Source(model, clean, build_from_values(ModelSpec, values), seed)
            built = [build_from_values(cls, values, prefix) for cls, prefix, _ in parts]
            with use_precision(precision):
                function(source, *built, **values)

        decorated = run
        for cls, prefix, defaults in reversed(parts):
            decorated = options(cls, prefix, defaults)(decorated)
        for decorator in (options(ModelSpec), PRECISION, SEED, CLEAN):
            decorated = decorator(decorated)
        decorated = click.argument("model", type=click.Path(path_type=Path))(decorated)
        return click.command(
            cls=GroupedCommand, groups=HEADINGS | headings, arguments=ARGUMENTS | arguments
        )(decorated)

    return decorate


def typed_command() -> str:
    """The command line of this process."""
    return shlex.join(["rnp", *sys.argv[1:]])
