"""`rnp`: one command per step, loaded when it is called, so that help stays fast."""

from __future__ import annotations

import contextlib
import errno
import importlib
import sys
from collections.abc import Iterator

import click

from rnp.errors import NonFiniteLossError, UserError
from rnp.registry import suggest
from rnp.training.malloc import keep_freed_pages

GROUPS = {
    "Repair a model": {
        "inspect": "Examine a model of unknown origin; change nothing.",
        "purify": "Repair a model of unknown origin with a folder of clean images.",
        "detect": "Recover triggers, detect the target label, find triggered images.",
        "convert": "Take the weights out of an untrusted checkpoint, as safetensors.",
    },
    "The pipeline": {
        "prepare": "Split a data set between attacker, defender and test.",
        "benign": "Train a benign model on the attacker's training set.",
        "poison": "Make the trigger of an attack and poison the training set.",
        "train": "Train the backdoored model, and test whether its backdoor is real.",
        "unlearn": "Maximize the model's error on the defense set.",
        "recover": "Minimize the error again, one mask per neuron.",
        "prune": "Prune as many of the most suspicious neurons as the defense set allows.",
        "defend": "Repair the backdoored model by any defense.",
        "controls": "Run control experiments on a finished repair.",
        "evaluate": "Measure CA, ASR, RA and DER of every model.",
        "report": "Write one self-contained page about everything.",
    },
    "Compare and sweep": {
        "sweep": "Run a grid of configurations, several at a time.",
        "collect": "Append finished runs to a table of results.",
        "table": "Print finished runs as one table, with means over seeds.",
    },
    "Project": {
        "list": "List attacks, defenses, detectors, data sets, architectures and presets.",
        "preset": "Print a complete params.yaml.",
        "schema": "Print the JSON Schema of params.yaml, for editors.",
        "check": "Check params.yaml against the options of every command.",
        "setup": "Create the MLflow store, and let DVC work where there is no git.",
        "bench": "Measure speed and memory on this machine.",
    },
}
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}


class Lazy(click.Group):
    """A group that imports a command when it runs or explains it, not to list it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        member = f"{cmd_name}_" if cmd_name == "list" else cmd_name  # not to hide the built-in
        return getattr(importlib.import_module(f"rnp.cli.{cmd_name}"), member)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        """Raises: UserError that suggests the nearest command, for a name that there is not."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise UserError(f"unknown command {args[0]!r}{suggest(args[0], list(COMMANDS))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


@click.group(
    cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "show_default": True}
)
@click.version_option(package_name="rnp")
def cli() -> None:
    """Remove backdoors from image classifiers: Reconstructive Neuron Pruning and what it is
    compared with.
    """


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """One clear line and an exit code for what a user can mend (2) and for what a machine does to
    us (1).
    """
    try:
        yield
    except UserError as error:
        leave(str(error), 2)
    except NonFiniteLossError as error:
        leave(f"{error}; lower the learning rate", 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        leave(
            f"the disk is full: {error.filename or 'no space left'}; free some and run again,"
            " nothing was half-written",
            1,
        )


def leave(message: str, code: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(code)


def main() -> None:
    keep_freed_pages()
    with guard():
        cli()
