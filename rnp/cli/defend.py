"""Repair the backdoored model by a defense other than RNP."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from rnp.cli.options import command
from rnp.cli.progress import progress
from rnp.defenses.base import UNLEARNED, Defense
from rnp.evaluation.checks import check_and_warn
from rnp.io.datasets import load_defense_set
from rnp.io.files import write_json, write_rows
from rnp.io.history import History
from rnp.io.models import load_model, save_model
from rnp.registry import load, names
from rnp.seeds import generator
from rnp.training.predict import accuracy


class Defenses(click.Group):
    """One sub-command per defense, with its own options."""

    def list_commands(self, context: click.Context) -> list[str]:
        return names("defense")

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in names("defense"):
            return None
        return command(name, load("defense", name), inputs=("model", "defense"))(repair)


def repair(
    method: Defense, *, model: Path, defense: Path, out: Path, report: Path, seed: int
) -> None:
    """Write the repaired model to OUT."""
    victim, architecture, classes = load_model(model)
    clean = check_and_warn(victim, classes, load_defense_set(defense))
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
    ).touch()  # a defense that trains nothing tells of no epoch, and DVC wants the file
    write_json(
        report / "metrics.json",
        {
            "accuracy_defense_val": accuracy(repaired.model, clean.val),
            **(
                {"pruned": repaired.chosen.pruned, "threshold": repaired.chosen.threshold}
                if repaired.chosen
                else {}
            ),
        },
    )


@click.group(cls=Defenses)
def defend() -> None:
    """Repair the backdoored model by a defense other than RNP."""
