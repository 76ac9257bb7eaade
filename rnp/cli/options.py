"""Options from dataclasses: a field's name is the option, its annotation type, range and help."""

from __future__ import annotations

import os
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click

from rnp.errors import UserError
from rnp.params.fields import (
    Hyperparameter,
    build_from_values,
    click_settings,
    iter_hyperparameters,
)
from rnp.registry import names, suggest

PATH = click.Path(path_type=Path)
EXISTING = click.Path(path_type=Path, exists=True)
SEED = click.option("--seed", type=int, default=0, help="random seed")
PRECISION = click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "auto"]),
    default="auto",
    help="arithmetic; auto takes bf16 where the hardware has it",
)


INPUTS = {
    "benign": "the benign model",
    "defense": "the defender's clean images, of `rnp prepare`",
    "masks": "the folder of `rnp recover`",
    "model": "the backdoored model",
    "poisoned": "the poisoned training set",
    "pool": "the attacker's training images, of `rnp prepare`",
    "pruned": "the folder of `rnp prune`",
    "reports": "the folder that holds a report folder per stage",
    "test": "the test images, of `rnp prepare`",
    "triggered": "the triggered test images, of `rnp train`",
    "unlearned": "the folder of `rnp unlearn`",
}
"""What an earlier stage made, by the option that names it."""


def options(cls: type, prefix: str = "", like: object = None) -> Callable:
    """A decorator that gives a click command one option per hyperparameter of `cls`.

    Defaults are those of `like`, an instance of `cls`, if it is given.
    """

    def decorate(command: Callable) -> Callable:
        for each in reversed(list(iter_hyperparameters(cls, prefix, like))):
            option = click.option(
                *flag_and_name(each),
                **click_settings(each.type),
                default=each.default,
                help=each.help,
                show_default=each.default != "",
            )
            command = option(command)
        return command

    return decorate


def flag_and_name(key: Hyperparameter) -> tuple[str, str]:
    """The flag, and the name under which click hands the value on."""
    name = key.name.replace("_", "-")
    return f"--{name}/--no-{name}" if key.type is bool else f"--{name}", key.argument


class Files(SimpleNamespace):
    """The paths of a stage, each by the name of its option."""


class StageCommand(click.Command):
    """A stage; `parallel` says whether several processes of torchrun can share its work."""

    parallel = False


def command(
    name: str,
    *hyperparameters: type | tuple[type, str],
    inputs: tuple[str, ...] = (),
    outputs: dict[str, str] | None = None,
    seed: bool = True,
    precision: bool = True,
    parallel: bool = False,
) -> Callable[[Callable[..., None]], StageCommand]:
    """A stage as a click command.

    The function is called with one instance of each class in `hyperparameters` (with a prefix
    where a tuple gives one), with `files`, the paths of inputs, outputs and `report`, and `seed`.
    `inputs` are keys of `INPUTS`, `outputs` are options with their help texts; without them there
    is `--out`. Under torchrun only those commands run that are `parallel`.
    """
    pairs = [each if isinstance(each, tuple) else (each, "") for each in hyperparameters]

    def decorate(function: Callable[..., None]) -> StageCommand:
        def run(**values: object) -> None:
            from rnp.training.device import use_precision  # loads PyTorch

            if not parallel and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise UserError(f"{name} is no work for several processes; run it without torchrun")
            arithmetic = typing.cast("typing.Any", values.pop("precision", "auto"))
            methods = [build_from_values(cls, values, prefix) for cls, prefix in pairs]
            paths = {name: path for name, path in values.items() if isinstance(path, Path)}
            others = {name: value for name, value in values.items() if name not in paths}
            with use_precision(arithmetic):
                function(*methods, files=Files(**paths), **others)

        run.__doc__ = function.__doc__
        for cls, prefix in reversed(pairs):
            run = options(cls, prefix)(run)
        if precision:
            run = PRECISION(run)
        if seed:
            run = SEED(run)
        report = "folder for metrics, history and figures"
        run = click.option("--report", type=PATH, required=True, help=report)(run)
        made = {"out": "what this stage makes"} if outputs is None else outputs
        for option, text in reversed(made.items()):
            run = click.option(f"--{option}", type=PATH, required=True, help=text)(run)
        for option in reversed(inputs):
            text = INPUTS[option]
            run = click.option(f"--{option}", type=EXISTING, required=True, help=text)(run)
        stage = click.command(name, cls=StageCommand)(run)
        stage.parallel = parallel
        return stage

    return decorate


class Family(click.Group):
    """A group with a sub-command per method of a family, which has the options of that method."""

    def __init__(
        self,
        name: str,
        *,
        family: str,
        make: Callable[[str], click.Command],
        **settings: typing.Any,
    ) -> None:
        super().__init__(name, **settings)
        self.family = family
        self.make = make

    def list_commands(self, ctx: click.Context) -> list[str]:
        return names(self.family)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self.make(cmd_name) if cmd_name in names(self.family) else None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        """Raises: UserError that suggests the nearest name, for a name that there is not."""
        if args and not args[0].startswith("-") and args[0] not in names(self.family):
            raise UserError(
                f"unknown {self.family} {args[0]!r}{suggest(args[0], names(self.family))}"
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The names alone: to describe each method it would have to be loaded."""
        with formatter.section("Commands"):
            formatter.write_text(", ".join(names(self.family)))
