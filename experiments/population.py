"""Do the detectors of a label tell backdoored models from benign ones? `python -m
benchmarks.population TABLE --models 20`.

Trains that many models of each kind with the settings of a preset, each with a seed, a split and
an attack of its own, every second one without augmentation, asks every detector, and adds a row
for each model and detector to the table; with `--folder` the models are the benign model and, where there
is one, the backdoored model that a pipeline left in that folder. Models that have their rows
already are not asked again. `--summary` prints the ROC of each detector instead: AUROC with a 95 %
interval (bootstrap over models, seed 0), the share of backdoored models above the threshold that 5
% of the benign ones exceed, how often the label with the highest score is right, and at the
detector's own threshold the false alarms among benign models, the backdoors named and the right
labels among them. Backdoored models that fail the gate on ASR do not count. `--roc FILE` draws the
curves too.

Detectors that were asked of the unlearned copy have `_unlearned` behind their names, a star in the
picture; the seconds leave out the unlearning and the search for triggers, which several share.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import yaml
from rnp.defenses.base import UNLEARNED
from torch import nn

from rnp.attacks.base import backdoored_test_set
from rnp.cli.prepare import data_root
from rnp.clock import Clock
from rnp.data.base import Split
from rnp.detection.metrics import roc_points
from rnp.detection.run import Detect, detectors, select_detectors, unlearn_and_detect_labels
from rnp.evaluation.metrics import score
from rnp.io.datasets import load_defense_set, load_images
from rnp.io.files import upsert_rows, read_json
from rnp.io.models import load_model
from rnp.models.build import Architecture
from rnp.params.fields import from_section
from rnp.params.presets import render
from rnp.params.read import Loader, flatten, read_params
from rnp.registry import load, names
from rnp.reporting.plots import roc
from rnp.reporting.provenance import provenance
from rnp.reporting.rows import load_current_runs, format_row
from rnp.seeds import generator
from rnp.training.device import default_device
from rnp.training.predict import accuracy
from rnp.training.recipe import Train
from rnp.types import ImageSet
from rnp.unlearn import Unlearn

COLUMNS = (
    "preset",
    "kind",
    "seed",
    "attack",
    "augment",
    "clean_accuracy",
    "attack_success_rate",
    "gate",
    "detector",
    "score",
    "margin",
    "label",
    "named",
    "label_correct",
    "seconds",
    "n_clean",
    "device",
    "torch",
)
MODEL = ("preset", "kind", "seed", "attack")
KEY = (*MODEL, "detector")
ATTACKS = ("badnets", "blend", "multi", "wanet", "sig")


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model and the clean images that the one who examines it works on."""

    model: nn.Module
    clean: ImageSet
    facts: dict[str, object]
    target: int | None = None


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model that is trained or read when its turn comes."""

    kind: str
    attack: str
    params: dict
    subject: Callable[[], Subject]

    @property
    def identity(self) -> dict[str, object]:
        return {
            "preset": self.params["preset"],
            "kind": self.kind,
            "seed": self.params["seed"],
            "attack": self.attack,
        }


def to_train(preset: str, models: int) -> Iterator[Candidate]:
    for seed in range(models):
        params = yaml.load(render(preset), Loader) | {"seed": seed}
        if seed % 2:
            params["train"]["augment"] = {"crop": 0, "flip": False}
        for kind, attack in (("benign", ""), ("backdoored", ATTACKS[seed % len(ATTACKS)])):
            yield Candidate(kind, attack, params, functools.partial(trained, params, attack))


def trained(params: dict, name: str) -> Subject:
    """A model with the backdoor of the attack `name`; a benign one where it is empty."""
    section, seed = (
        {key: dict(flatten(value)) for key, value in params.items() if isinstance(value, dict)},
        params["seed"],
    )
    chosen = params["data"]["set"]
    train, test = from_section(load("dataset", chosen), section["datasets"], f"{chosen}.").load(
        data_root(), rng=generator(seed, "prepare")
    )
    splits = from_section(Split, section["data"])(train, test, rng=generator(seed, "split"))
    recipe = from_section(Train, section["train"])
    data, rng = splits.pool, generator(seed, f"population/{'backdoored' if name else 'benign'}")
    model = from_section(Architecture, section["model"]).build_for(data, rng=rng)
    model, facts, target = model.to(default_device()), {"augment": augments(params)}, None
    if name:
        attack = from_section(load("attack", name), section["attacks"], f"{name}.")
        attack = dataclasses.replace(attack, target_label=seed % len(data.classes))
        changes, target = (
            attack.poison(data, rng=generator(seed, "poison"), surrogate=model),
            attack.target,
        )
        start = time.process_time()
        model, trigger = attack.train(model, changes.apply(data), changes.trigger, recipe, rng=rng)
        facts["core_seconds"] = time.process_time() - start
        scores = score(
            model, test, backdoored_test_set(trigger, test, target), target, precision="auto"
        )
        facts |= {
            "attack_success_rate": scores.attack_success_rate.value,
            "gate": scores.attack_success_rate.value >= attack.min_asr,
        }
    else:
        recipe(model, data, rng=rng)
    facts |= {"clean_accuracy": accuracy(model, test), "n_clean": len(test)}
    return Subject(model.eval(), splits.defense.train, facts, target)


def augments(params: dict) -> bool:
    return params["train"]["augment"]["flip"] or params["train"]["augment"]["crop"] > 0


def to_read(folder: Path) -> Iterator[Candidate]:
    """Raises: UserError when `folder` has no params.yaml, or its models are of other parameters."""
    params = read_params(folder / "params.yaml")
    facts = {"augment": augments(params)}
    for kind, stage, name, attack in (
        ("benign", "benign", "benign", ""),
        ("backdoored", "train", "backdoored", params["poison"]["attack"]),
    ):
        model = folder / "models" / f"{name}.safetensors"
        if model.exists():
            load_current_runs(folder / "reports", params, (stage,))
            measured = read_json(folder / "reports" / stage / "metrics.json")
            yield Candidate(
                kind, attack, params, functools.partial(read, folder, model, measured, facts)
            )


def read(folder: Path, model: Path, measured: dict, facts: dict[str, object]) -> Subject:
    facts, target = (
        facts
        | {
            "clean_accuracy": measured["clean_accuracy"],
            "n_clean": len(load_images(folder / "data" / "test")),
        },
        None,
    )
    if "gate" in measured:
        facts |= {"attack_success_rate": measured["attack_success_rate"], "gate": measured["gate"]}
        target = read_json(folder / "data" / "triggered" / "attack.json")["target_label"]
    return Subject(
        load_model(model)[0], load_defense_set(folder / "data" / "defense").train, facts, target
    )


def verdicts(subject: Subject, params: dict) -> Iterator[dict[str, object]]:
    """One row for each detector of labels and each model it is asked of; the defender's images are
    all that they see.
    """
    given, clock = dict(flatten(params["detect"])), Clock()
    options = dataclasses.replace(from_section(Detect, given), labels=tuple(names("labels")))
    methods = [from_section(cls, given, prefix) for cls, prefix in detectors()]
    label_scores = unlearn_and_detect_labels(
        subject.model,
        from_section(Unlearn, dict(flatten(params["unlearn"]))),
        select_detectors(options, methods),
        options.trigger_checkpoint,
        subject.clean,
        params["seed"],
        clock,
    )
    for name, each in label_scores.items():
        first = int(each.scores.argmax())
        yield {
            "detector": name,
            "score": float(each.scores.max()),
            "margin": each.verdict.margin,
            "label": first,
            "named": each.verdict.label is not None,
            "seconds": clock.seconds.get(f"labels_{name}"),
            "label_correct": "" if subject.target is None else first == subject.target,
        }


def counted(
    rows: list[dict[str, str]],
) -> Iterator[tuple[str, list[dict[str, str]], np.ndarray, np.ndarray]]:
    """Each detector, its rows, which of them are of backdoored models, and their scores; backdoors
    that failed the gate do not count.
    """
    rows = [row for row in rows if row["gate"] != "false"]
    for detector in sorted({row["detector"] for row in rows}):
        own = [row for row in rows if row["detector"] == detector]
        yield (
            detector,
            own,
            np.array([row["kind"] == "backdoored" for row in own]),
            np.array([float(row["score"]) for row in own]),
        )


def summary(rows: list[dict[str, str]]) -> Iterator[str]:
    """A line of a Markdown table for each detector, the best first."""
    from sklearn.metrics import roc_auc_score

    yield (
        "| detector | benign | backdoored | AUROC | 95 % interval | found at 5 % | first label"
        " right | false alarms | named | named right |"
    )
    yield "|---" * 10 + "|"
    for detector, own, bad, values in sorted(
        counted(rows), key=lambda each: -roc_auc_score(*each[2:])
    ):
        draw, areas = np.random.default_rng(0), []
        for _ in range(2000):
            picked = np.concatenate(
                [
                    draw.choice(np.flatnonzero(bad == kind), (bad == kind).sum())
                    for kind in (True, False)
                ]
            )
            areas.append(roc_auc_score(bad[picked], values[picked]))
        low, high = np.quantile(areas, [0.025, 0.975])
        named, right = (
            np.array([row[key] == "true" for row in own]) for key in ("named", "label_correct")
        )
        found = (values[bad] > np.quantile(values[~bad], 0.95)).mean()
        yield (
            f"| {detector} | {(~bad).sum()} | {bad.sum()} | {roc_auc_score(bad, values):.3f} |"
            f" {low:.3f} to {high:.3f} | {found:.2f} | {right[bad].sum()} | {named[~bad].sum()} |"
            f" {named[bad].sum()} | {(named & right)[bad].sum()} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="CSV file that takes the rows")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--models", type=int, default=20, help="of each kind")
    parser.add_argument(
        "--folder",
        type=Path,
        help="ask the models of the pipeline in this folder instead; none is trained",
    )
    parser.add_argument(
        "--summary", action="store_true", help="print the table of a finished population"
    )
    parser.add_argument(
        "--roc", type=Path, help="with --summary: also draw the curves to this picture"
    )
    arguments = parser.parse_args()
    rows = list(csv.DictReader(arguments.table.open())) if arguments.table.exists() else []
    if arguments.summary:
        print("\n".join(summary(rows)))
        if arguments.roc:

            def starred(name):
                return f"{name.removesuffix(UNLEARNED)} *" if name.endswith(UNLEARNED) else name

            roc(
                arguments.roc,
                {starred(name): roc_points(values, bad) for name, _, bad, values in counted(rows)},
                "backdoored models",
                "benign models",
            )
        return
    done = {tuple(row[name] for name in MODEL) for row in rows}
    for each in (
        to_read(arguments.folder)
        if arguments.folder
        else to_train(arguments.preset, arguments.models)
    ):
        if tuple(map(str, each.identity.values())) in done:
            continue
        subject = each.subject()
        common = each.identity | subject.facts | provenance()
        found = [format_row(common | row, COLUMNS) for row in verdicts(subject, each.params)]
        upsert_rows(arguments.table, found, COLUMNS, KEY)
        print(
            *each.identity.values(),
            subject.facts,
            [(row["detector"], row["score"], row["label"]) for row in found],
            flush=True,
        )


if __name__ == "__main__":
    main()
