"""`rnp`: one command per step, loaded when it is called, so that help stays fast."""

from __future__ import annotations

import contextlib
import errno
import importlib
import sys
from collections.abc import Iterator

import click

from rnp.errors import NonFiniteLossError, UserError
from rnp.training.malloc import keep_freed_pages

COMMANDS = {
    "preset": "Print a complete params.yaml.",
    "check": "Check params.yaml against the options of every command.",
    "list": "Name the attacks, defenses, detectors, data sets, architectures and presets.",
    "setup": "Create the MLflow store, and let DVC work where there is no git.",
    "prepare": "Split a data set between attacker, defender and test.",
    "benign": "Train a benign model on the attacker's training set.",
    "poison": "Make the trigger and poison the training set.",
    "train": "Train the backdoored model and test whether its backdoor is real.",
    "unlearn": "Maximize the model's error on the defense set.",
    "recover": "Minimize it again, one mask per neuron.",
    "prune": "Choose on the defense set how many neurons to prune, and prune them.",
    "defend": "Repair the backdoored model by another defense.",
    "detect": "Recover triggers, name the target label, find triggered images.",
    "controls": (
        "Ask of a repair what it costs a benign model, how soon the backdoor returns, what fewer"
        " images do."
    ),
    "evaluate": "Measure CA, ASR, RA and DER of every model.",
    "report": "Write one self-contained page about everything.",
    "sweep": "Run a grid of configurations, several at a time.",
    "rows": "Append finished runs to a table of results.",
    "table": "Print finished runs as one table, with means over seeds.",
    "purify": "Repair a stranger's model with a folder of clean images.",
    "inspect": "Say what is odd about a stranger's model; change nothing.",
    "convert": "Take the weights out of a stranger's checkpoint, as safetensors.",
    "gallery": "Write the page that shows every attack.",
    "bench": "Measure speed and memory of everything on this machine.",
}
ELSEWHERE = {"list": ("list", "list_"), "detect": ("detect", "detect")}
"""Module and member of the commands that are not called as their module is."""


class Lazy(click.Group):
    """A group that imports a command when it runs or explains it, not to list it."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, member = ELSEWHERE.get(name, (name, name))
        return getattr(importlib.import_module(f"rnp.cli.{module}"), member)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
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
