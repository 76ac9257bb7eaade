"""Repair the backdoored model by a defence other than RNP."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from rnp.cli.concerns import warn
from rnp.cli.options import command, generator
from rnp.cli.progress import progress
from rnp.defences.base import UNLEARNED, Defence
from rnp.io import History, load_defence_set, load_model, save_model, write_json, write_rows
from rnp.registry import load, names
from rnp.training import accuracy


class Defences(click.Group):
    """One sub-command per defence, with its own options."""

    def list_commands(self, context: click.Context) -> list[str]:
        return names("defence")

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in names("defence"):
            return None
        return command(name, load("defence", name), inputs=("model", "defence"))(repair)


def repair(
    method: Defence, *, model: Path, defence: Path, out: Path, report: Path, seed: int
) -> None:
    """Write the repaired model to OUT."""
    victim, architecture, classes = load_model(model)
    clean = warn(victim, classes, load_defence_set(defence))
    rng = generator(seed, f"defend/{method.name.removesuffix(UNLEARNED)}")
    with (
        History(report / "history.csv") as history,
        progress(method.name, None, history) as on_epoch,
    ):
        repaired = method.repair(victim, clean, rng=rng, on_epoch=on_epoch)
    save_model(out, repaired.model, architecture, classes)
    if repaired.sweep:
        write_rows(report / "sweep.csv", [dataclasses.asdict(point) for point in repaired.sweep])
    report.mkdir(parents=True, exist_ok=True)
    (
        report / "history.csv"
    ).touch()  # a defence that trains nothing tells of no epoch, and DVC wants the file
    write_json(
        report / "metrics.json",
        {
            "accuracy_defence_val": accuracy(repaired.model, clean.val),
            **(
                {"pruned": repaired.chosen.pruned, "threshold": repaired.chosen.threshold}
                if repaired.chosen
                else {}
            ),
        },
    )


@click.group(cls=Defences)
def defend() -> None:
    """Repair the backdoored model by a defence other than RNP."""
