"""Run control experiments on a finished run."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.cli.options import Files, command
from rnp.evaluation.controls import Controls, Run, control_metrics, run_controls
from rnp.evaluation.metrics import EvaluationSets
from rnp.io.datasets import load_defense_set, load_images, load_poisoned
from rnp.io.files import read_json, write_json, write_rows
from rnp.io.models import load_model
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.types import ImageSet
from rnp.unlearn import Unlearn


@command(
    "controls",
    Controls,
    (Unlearn, "unlearn."),
    (Recover, "recover."),
    (Prune, "prune."),
    outputs={},
    inputs=("model", "benign", "pruned", "defense", "pool", "poisoned", "test", "triggered"),
)
def controls(
    options: Controls, unlearn: Unlearn, recover: Recover, prune: Prune, *, files: Files, seed: int
) -> None:
    """Run control experiments on a finished run, and write their scores to REPORT.

    benign: RNP on the benign model, which was never backdoored. reinfection: the repaired and the
    benign model are fine-tuned on the defender's images and a few poisoned ones. equal_time: plain
    fine-tuning for as long as RNP takes. defense_size: RNP with fewer images. distribution_shift:
    RNP with darker, noisy images.
    """
    tests = EvaluationSets(
        load_images(files.test),
        load_images(files.triggered / "test"),
        read_json(files.triggered / "attack.json")["target_label"],
    )
    run = Run(
        options=options,
        unlearn=unlearn,
        recover=recover,
        prune=prune,
        seed=seed,
        benign=load_model(files.benign)[0],
        backdoored=load_model(files.model)[0],
        repaired=load_model(files.pruned / "model.safetensors")[0],
        defense=load_defense_set(files.defense),
        poisoned=load_poisoned_images(files.pool, files.poisoned),
        tests=tests,
    )
    rows = []
    for row in run_controls(run):
        rows.append(row)
        click.echo(
            f"{row['control']} {row['model']} {row['amount']}: CA {row['clean_accuracy']:.3f}, ASR"
            f" {row['attack_success_rate']:.3f}"
        )
    write_rows(files.report / "rows.csv", rows)
    write_json(files.report / "metrics.json", control_metrics(rows, options.experiments))


def load_poisoned_images(pool: Path, poisoned: Path) -> ImageSet:
    """The poisoned images with their labels, without covers."""
    changes = load_poisoned(poisoned)[0]
    real = ~changes.covers
    return ImageSet(changes.images[real], changes.labels[real], load_images(pool).classes)
