"""Control experiments."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.cli.options import command
from rnp.evaluation.controls import EXPERIMENTS, Controls, Run
from rnp.io.datasets import load_defense_set, load_images, load_poisoned
from rnp.io.files import read_json, write_json, write_rows
from rnp.io.models import load_model
from rnp.params.fields import from_section
from rnp.params.read import flatten, read_params
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.types import ImageSet
from rnp.unlearn import Unlearn


@command(
    "controls",
    Controls,
    outs=(),
    inputs=("model", "benign", "pruned", "defense", "pool", "poisoned", "test", "triggered"),
)
def controls(
    options: Controls,
    *,
    model: Path,
    benign: Path,
    pruned: Path,
    defense: Path,
    pool: Path,
    poisoned: Path,
    test: Path,
    triggered: Path,
    report: Path,
    seed: int,
) -> None:
    """Ask of a finished run what a single repair does not tell; RNP runs with the settings in
    params.yaml.

    benign: RNP on the benign model, which was never backdoored. relapse: the repaired model, and the benign model
    beside it, are tuned with a few poisoned images among the defender's. same_time: plain
    fine-tuning for as long as RNP takes. images: RNP with fewer images. shifted: RNP with darker,
    noisy ones.
    """
    params, changes = read_params(Path("params.yaml")), load_poisoned(poisoned)[0]
    methods = {
        name: from_section(cls, dict(flatten(params[name])))
        for name, cls in (("unlearn", Unlearn), ("recover", Recover), ("prune", Prune))
    }
    real = ~changes.covers
    run = Run(
        **methods,
        options=options,
        seed=seed,
        benign=load_model(benign)[0],
        backdoored=load_model(model)[0],
        repaired=load_model(pruned / "model.safetensors")[0],
        defense=load_defense_set(defense),
        poisoned=ImageSet(changes.images[real], changes.labels[real], load_images(pool).classes),
        tests=load_images(test),
        attacked=load_images(triggered / "test"),
        target=read_json(triggered / "attack.json")["target_label"],
    )
    rows = []
    for control in options.experiments:
        for row in EXPERIMENTS[control](run):
            rows.append({"control": control, "neurons_pruned": "", **row})
            click.echo(
                f"{control} {row['model']} {row['amount']}: CA {row['clean_accuracy']:.3f}, ASR"
                f" {row['attack_success_rate']:.3f}"
            )
    write_rows(report / "rows.csv", rows)
    kept = (
        "clean_accuracy_before",
        "attack_success_rate_before",
        "clean_accuracy",
        "attack_success_rate",
        "der",
    )
    write_json(
        report / "metrics.json",
        {
            control: {
                f"{row['model']} {row['amount']}": {name: row[name] for name in kept}
                for row in rows
                if row["control"] == control
            }
            for control in options.experiments
        },
    )
