"""Repair the backdoored model by a defense ."""

from __future__ import annotations

import dataclasses

import click
import torch

from rnp.cli.options import Family, Files, command
from rnp.defenses.base import UNLEARNED, Defense
from rnp.defenses.rnp import RNP
from rnp.evaluation.checks import check_and_warn
from rnp.io.datasets import load_defense_set
from rnp.io.files import write_json, write_rows
from rnp.io.history import History
from rnp.io.models import load_model, save_model
from rnp.registry import load
from rnp.reporting.progress import progress
from rnp.seeds import generator, root
from rnp.training.predict import accuracy


def repair(method: Defense, *, files: Files, seed: int) -> None:
    """Repair the backdoored model, and write it to OUT."""
    network, architecture, classes = load_model(files.model)
    clean = check_and_warn(network, classes, load_defense_set(files.defense))
    rng = generator_for(method, seed)
    with (
        History(files.report / "history.csv") as history,
        progress(method.name, None, history) as on_epoch,
    ):
        repaired = method.repair(network, clean, rng=rng, on_epoch=on_epoch)
    save_model(files.out, repaired.model, architecture, classes)
    if repaired.sweep:
        write_rows(
            files.report / "sweep.csv", [dataclasses.asdict(point) for point in repaired.sweep]
        )
    files.report.mkdir(parents=True, exist_ok=True)
    # A defense that trains nothing reports no epoch, and DVC wants the file.
    (files.report / "history.csv").touch()
    metrics: dict[str, object] = {"accuracy_defense_val": accuracy(repaired.model, clean.val)}
    if repaired.chosen:
        metrics |= {"pruned": repaired.chosen.pruned, "threshold": repaired.chosen.threshold}
    if repaired.tuned_labels is not None:
        metrics["tuned_labels"] = " ".join(map(str, repaired.tuned_labels))
    write_json(files.report / "metrics.json", metrics)


def generator_for(method: Defense, seed: int) -> torch.Generator:
    """That of the stages for RNP, else one of its own, which a variant shares with its defense."""
    if isinstance(method, RNP):
        return root(seed)
    return generator(seed, f"defend/{method.name.removesuffix(UNLEARNED)}")


def defend_command(name: str) -> click.Command:
    """The command for the defense `name`."""
    return command(name, load("defense", name), inputs=("model", "defense"))(repair)


defend = Family(
    "defend",
    family="defense",
    make=defend_command,
    help="Repair the backdoored model by a defense.",
)
