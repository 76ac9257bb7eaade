"""Do the detectors of a label tell backdoored models from benign ones? `python -m benchmarks.population TABLE --models 20`.

Trains that many models of each kind with the settings of a preset, each with a seed, a split and an attack of its own, every
second one without augmentation, asks every detector, and adds a row for each model and detector to the table. Models that
have their rows already are not trained again. `--summary` prints the ROC of each detector instead: AUROC with a 95 % interval
(bootstrap over models, seed 0), and at the detector's own threshold the false alarms among benign models, the backdoors named,
and the right labels among them; backdoored models that fail the gate on ASR do not count.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from rnp.attacks.base import backdoored_test_set
from rnp.augment import Augment
from rnp.cli.check import Loader, leaves
from rnp.cli.options import from_section, generator
from rnp.cli.prepare import data_root
from rnp.cli.preset import render
from rnp.cli.rows import machine, written
from rnp.data.base import Split, Splits
from rnp.detection.labels.class_shares import ClassShares
from rnp.detection.labels.neural_cleanse_index import NeuralCleanseIndex
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.io import put_rows
from rnp.metrics import score
from rnp.models.build import Architecture, statistics
from rnp.registry import load, names
from rnp.training import Train, accuracy, default_device
from rnp.unlearn import Unlearn

COLUMNS = ("preset", "kind", "seed", "attack", "augment", "clean_accuracy", "attack_success_rate", "gate", "detector", "score",
           "margin", "label", "named", "label_correct", "seconds", "n_clean", "device", "torch")
KEY = ("preset", "kind", "seed", "detector")
ATTACKS = ("badnets", "blend", "multi", "wanet", "sig")
KINDS = ("benign", "backdoored")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the clean images of the one who examines it."""

    model: nn.Module
    splits: Splits
    facts: dict[str, object]
    target: int | None


def make(params: dict, kind: str, seed: int) -> Subject:
    section = {name: dict(leaves(value)) for name, value in params.items() if isinstance(value, dict)}
    chosen = params["data"]["set"]
    train, test = from_section(load("dataset", chosen), section["datasets"], f"{chosen}.").load(data_root(), rng=generator(seed, "prepare"))
    splits = from_section(Split, section["data"])(train, test, rng=generator(seed, "split"))
    recipe = from_section(Train, section["train"])
    if seed % 2:
        recipe = dataclasses.replace(recipe, augment=Augment(crop=0, flip=False))
    data, rng = splits.pool, generator(seed, f"population/{kind}")
    model = from_section(Architecture, section["model"]).build(len(data.classes), data.shape[0], *statistics(data), rng=rng)
    model, facts, target = model.to(default_device()), {"augment": str(not seed % 2).lower()}, None
    if kind == "benign":
        recipe(model, data, rng=rng)
    else:
        name = ATTACKS[seed % len(ATTACKS)]
        attack = from_section(load("attack", name), section["attacks"], f"{name}.")
        attack = dataclasses.replace(attack, target_label=seed % len(data.classes))
        changes, target = attack.poison(data, rng=generator(seed, "poison"), surrogate=model), attack.target
        model, trigger = attack.train(model, changes.apply(data), changes.trigger, recipe, rng=rng)
        scores = score(model, test, backdoored_test_set(trigger, test, target), target, precision="auto")
        facts |= {"attack": name, "attack_success_rate": scores.attack_success_rate.value,
                  "gate": str(scores.attack_success_rate.value >= attack.gate).lower()}
    return Subject(model.eval(), splits, facts | {"clean_accuracy": accuracy(model, test), "n_clean": len(test)}, target)


def verdicts(subject: Subject, params: dict, seed: int) -> Iterator[dict[str, object]]:
    """One row for each detector of labels; the defender's images are all that they see."""
    clean, options = subject.splits.defence.train, dict(leaves(params["detect"]))
    for name in names("labels"):
        detector, start = from_section(load("labels", name), options, f"{name}."), time.perf_counter()
        rng = generator(seed, f"labels/{name}")
        if isinstance(detector, ClassShares):
            scores = detector.from_trajectory(from_section(Unlearn, dict(leaves(params["unlearn"])))(subject.model, clean, rng=rng).trajectory)
        elif isinstance(detector, NeuralCleanseIndex):
            search = from_section(NeuralCleanse, options, "neural_cleanse.")
            scores = detector.from_triggers(search.recover(subject.model, clean, rng=rng))
        else:
            scores = detector.score(subject.model, clean, rng=rng)
        verdict = detector.verdict(scores)
        yield {"detector": name, "score": float(scores.max()), "margin": verdict.margin, "label": int(scores.argmax()),
               "named": str(verdict.label is not None).lower(), "seconds": time.perf_counter() - start,
               "label_correct": "" if subject.target is None else str(int(scores.argmax()) == subject.target).lower()}


def summary(rows: list[dict[str, str]]) -> Iterator[str]:
    """A line of a Markdown table for each detector."""
    from sklearn.metrics import roc_auc_score

    yield "| detector | benign | backdoored | AUROC | 95 % interval | false alarms | backdoors named | label right |"
    yield "|---|---|---|---|---|---|---|---|"
    rows = [row for row in rows if row["gate"] != "false"]
    for detector in sorted({row["detector"] for row in rows}):
        own = [row for row in rows if row["detector"] == detector]
        bad, values = (np.array([cast(row) for row in own]) for cast in (lambda r: r["kind"] == "backdoored", lambda r: float(r["score"])))
        draw, areas = np.random.default_rng(0), []
        for _ in range(2000):
            picked = np.concatenate([draw.choice(np.flatnonzero(bad == kind), (bad == kind).sum()) for kind in (True, False)])
            areas.append(roc_auc_score(bad[picked], values[picked]))
        low, high = np.quantile(areas, [0.025, 0.975])
        named, right = (np.array([row[key] == "true" for row in own]) for key in ("named", "label_correct"))
        yield (f"| {detector} | {(~bad).sum()} | {bad.sum()} | {roc_auc_score(bad, values):.3f} | {low:.3f} to {high:.3f} |"
               f" {named[~bad].sum()} | {named[bad].sum()} | {(named & right)[bad].sum()} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="CSV file that takes the rows")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--models", type=int, default=20, help="of each kind")
    parser.add_argument("--summary", action="store_true", help="print the table of a finished population")
    arguments = parser.parse_args()
    rows = list(csv.DictReader(arguments.table.open())) if arguments.table.exists() else []
    if arguments.summary:
        print("\n".join(summary(rows)))
        return
    params = yaml.load(render(arguments.preset), Loader)
    done = {(row["preset"], row["kind"], row["seed"]) for row in rows}
    for seed in range(arguments.models):
        for kind in KINDS:
            if (arguments.preset, kind, str(seed)) in done:
                continue
            subject = make(params, kind, seed)
            common = {"preset": arguments.preset, "kind": kind, "seed": seed, "device": machine(), "torch": torch.__version__}
            found = [written(common | subject.facts | row, COLUMNS) for row in verdicts(subject, params, seed)]
            put_rows(arguments.table, found, COLUMNS, KEY)
            print(kind, seed, subject.facts, [(row["detector"], row["score"], row["label"]) for row in found], flush=True)


if __name__ == "__main__":
    main()
