"""Do the label detectors tell backdoored models from benign ones? `python -m experiments.population
TABLE --models 20`.

Trains that many models of each kind with the settings of a preset, each with a seed, a split and an
attack of its own, every second one without augmentation, runs every detector, and adds a row for
each model and detector to the table. With `--folder` the models are the benign one and, where there
is one, the backdoored one of the pipeline in that folder. Models that have their rows already are
left out.

`--summary` prints the ROC of each detector instead: AUROC with a 95 % interval (bootstrap over
models, seed 0), the share of backdoored models above the threshold that 5 % of the benign ones
exceed, how often the label with the highest score is right, and at the detector's own threshold the
false alarms among benign models, the backdoors detected and the right labels among them. Backdoored
models that fail the gate on ASR do not count. `--roc FILE` draws the curves too.

Detectors that ran on the unlearned copy have `_unlearned` behind their names, a star in the figure;
the seconds exclude the unlearning and the search for triggers, which several share.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn

from experiments.settings import configured, configured_attack, precision, split_data
from rnp.attacks.base import Attack, backdoored_test_set
from rnp.clock import Clock
from rnp.data.base import Splits
from rnp.defenses.base import UNLEARNED
from rnp.detection.metrics import roc_points
from rnp.detection.run import Detect, detectors, select_detectors, unlearn_and_detect_labels
from rnp.evaluation.metrics import score
from rnp.io.datasets import load_defense_set, load_images
from rnp.io.files import read_json, read_rows, upsert_rows
from rnp.io.models import load_model
from rnp.models.build import Architecture
from rnp.params.presets import render
from rnp.params.read import Loader, read_params
from rnp.registry import names
from rnp.reporting.columns import format_row
from rnp.reporting.plots import roc
from rnp.reporting.provenance import provenance
from rnp.reporting.rows import load_current_runs
from rnp.seeds import generator
from rnp.training.device import default_device, use_precision
from rnp.training.predict import accuracy
from rnp.training.recipe import Train
from rnp.types import ImageSet
from rnp.unlearn import Unlearn

MODEL = ("preset", "kind", "seed", "attack")
KEY = (*MODEL, "detector")
COLUMNS = (
    *MODEL,
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
ATTACKS = ("badnets", "blend", "multi", "wanet", "sig")
RESAMPLES = 2000
Columns = dict[str, object]
Row = dict[str, str]


@dataclass(frozen=True)
class Subject:
    """A model, the defender's clean images, and the columns about the model."""

    model: nn.Module
    clean: ImageSet
    columns: Columns
    target: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A model that is trained or read when its turn comes."""

    kind: str
    attack: str
    params: dict
    get_subject: Callable[[], Subject]

    @property
    def identity(self) -> Columns:
        return {
            "preset": self.params["preset"],
            "kind": self.kind,
            "seed": self.params["seed"],
            "attack": self.attack,
        }


def to_train(preset: str, models: int) -> Iterator[Candidate]:
    """A benign and a backdoored model for each seed."""
    for seed in range(models):
        params = yaml.load(render(preset), Loader) | {"seed": seed}
        if seed % 2:
            params["train"]["augment"] = {"crop": 0, "flip": False}
        attack = ATTACKS[seed % len(ATTACKS)]
        yield Candidate("benign", "", params, functools.partial(train_benign, params))
        yield Candidate(
            "backdoored", attack, params, functools.partial(train_backdoored, params, attack)
        )


def build_model(params: dict, splits: Splits, kind: str) -> tuple[nn.Module, torch.Generator]:
    """A new model, and the generator that goes on to its training."""
    rng = generator(params["seed"], f"population/{kind}")
    architecture = configured(Architecture, params, "model")
    return architecture.build_for(splits.pool, rng=rng).to(default_device()), rng


def train_benign(params: dict) -> Subject:
    splits = split_data(params, params["seed"])
    model, rng = build_model(params, splits, "benign")
    with use_precision(precision(params)):
        configured(Train, params, "train")(model, splits.pool, rng=rng)
    return subject_of(params, model, splits)


def train_backdoored(params: dict, attack_name: str) -> Subject:
    """A model with a backdoor; the target label is the seed, modulo the classes."""
    seed = params["seed"]
    splits = split_data(params, seed)
    model, rng = build_model(params, splits, "backdoored")
    attack: Attack = dataclasses.replace(
        configured_attack(params, attack_name), target_label=seed % len(splits.pool.classes)
    )
    recipe = configured(Train, params, "train")
    with use_precision(precision(params)):
        changes = attack.poison(splits.pool, rng=generator(seed, "poison"), surrogate=model)
        data = changes.apply(splits.pool)
        start = time.process_time()
        model, trigger = attack.train(model, data, changes.trigger, recipe, rng=rng)
        seconds = time.process_time() - start
    triggered = backdoored_test_set(trigger, splits.test, attack.target)
    asr = score(model, splits.test, triggered, attack.target, precision="auto").attack_success_rate
    measured: Columns = {
        "core_seconds": seconds,
        "attack_success_rate": asr.value,
        "gate": asr.value >= attack.min_asr,
    }
    return subject_of(params, model, splits, measured, attack.target)


def subject_of(
    params: dict,
    model: nn.Module,
    splits: Splits,
    measured: Columns | None = None,
    target: int | None = None,
) -> Subject:
    columns: Columns = {
        "augment": augments(params),
        **(measured or {}),
        "clean_accuracy": accuracy(model, splits.test),
        "n_clean": len(splits.test),
    }
    return Subject(model.eval(), splits.defense.train, columns, target)


def augments(params: dict) -> bool:
    """Whether the training images were flipped or cropped."""
    return params["train"]["augment"]["flip"] or params["train"]["augment"]["crop"] > 0


def to_read(folder: Path) -> Iterator[Candidate]:
    """The models that a pipeline left in a folder.

    Raises: UserError when the folder has no params.yaml, or models of other parameters.
    """
    params = read_params(folder / "params.yaml")
    for kind, stage, attack in (
        ("benign", "benign", ""),
        ("backdoored", "train", params["poison"]["attack"]),
    ):
        if (folder / "models" / f"{kind}.safetensors").exists():
            load_current_runs(folder / "reports", params, (stage,))
            read = functools.partial(read_subject, folder, params, kind, stage)
            yield Candidate(kind, attack, params, read)


def read_subject(folder: Path, params: dict, kind: str, stage: str) -> Subject:
    metrics = read_json(folder / "reports" / stage / "metrics.json")
    columns: Columns = {
        "augment": augments(params),
        "clean_accuracy": metrics["clean_accuracy"],
        "n_clean": len(load_images(folder / "data" / "test")),
    }
    target = None
    if "gate" in metrics:
        columns |= {name: metrics[name] for name in ("attack_success_rate", "gate")}
        target = read_json(folder / "data" / "triggered" / "attack.json")["target_label"]
    model, _, _ = load_model(folder / "models" / f"{kind}.safetensors")
    clean = load_defense_set(folder / "data" / "defense").train
    return Subject(model, clean, columns, target)


def verdicts(subject: Subject, params: dict) -> Iterator[Columns]:
    """One row for each label detector and each model that it runs on; it sees clean images only."""
    clock = Clock()
    chosen: Detect = configured(Detect, params, "detect")
    options = dataclasses.replace(chosen, labels=tuple(names("labels")))
    methods = (configured(kind, params, "detect", prefix) for kind, prefix in detectors())
    with use_precision(precision(params)):
        results = unlearn_and_detect_labels(
            subject.model,
            configured(Unlearn, params, "unlearn"),
            select_detectors(options, methods),
            options.trigger_checkpoint,
            subject.clean,
            params["seed"],
            clock,
        )
    for name, result in results.items():
        label = int(result.scores.argmax())
        yield {
            "detector": name,
            "score": float(result.scores.max()),
            "margin": result.verdict.margin,
            "label": label,
            "named": result.verdict.label is not None,
            "seconds": clock.seconds.get(f"labels_{name}"),
            "label_correct": "" if subject.target is None else label == subject.target,
        }


@dataclass(frozen=True)
class Population:
    """The rows of one detector, which of them are of backdoored models, and their scores."""

    detector: str
    rows: list[Row]
    backdoored: np.ndarray
    scores: np.ndarray

    def count(self, *columns: str, backdoored: bool = True) -> int:
        """The models of which all columns are true."""
        flags = [all(row[column] == "true" for column in columns) for row in self.rows]
        return int((np.array(flags) & (self.backdoored == backdoored)).sum())

    def auroc(self, positions: np.ndarray | slice = slice(None)) -> float:
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(self.backdoored[positions], self.scores[positions]))

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the AUROC, by bootstrap over models."""
        draw = np.random.default_rng(0)
        areas = []
        for _ in range(RESAMPLES):
            positions = [
                draw.choice(np.flatnonzero(members), members.sum())
                for members in (self.backdoored, ~self.backdoored)
            ]
            areas.append(self.auroc(np.concatenate(positions)))
        low, high = np.quantile(areas, [0.025, 0.975])
        return float(low), float(high)

    def detected(self) -> float:
        """The share of backdoored models above the threshold that 5 % of the benign exceed."""
        threshold = np.quantile(self.scores[~self.backdoored], 0.95)
        return float((self.scores[self.backdoored] > threshold).mean())


def populations(rows: list[Row]) -> Iterator[Population]:
    """One for each detector; backdoors that failed the gate do not count."""
    rows = [row for row in rows if row["gate"] != "false"]
    for detector in sorted({row["detector"] for row in rows}):
        members = [row for row in rows if row["detector"] == detector]
        yield Population(
            detector,
            members,
            np.array([row["kind"] == "backdoored" for row in members]),
            np.array([float(row["score"]) for row in members]),
        )


def summary(rows: list[Row]) -> Iterator[str]:
    """A line of a Markdown table for each detector, the best first."""
    yield (
        "| detector | benign | backdoored | AUROC | 95 % interval | found at 5 % | first label"
        " right | false alarms | named | named right |"
    )
    yield "|---" * 10 + "|"
    for one in sorted(populations(rows), key=lambda one: -one.auroc()):
        low, high = one.interval()
        yield (
            f"| {one.detector} | {one.count(backdoored=False)} | {one.count()} |"
            f" {one.auroc():.3f} | {low:.3f} to {high:.3f} | {one.detected():.2f} |"
            f" {one.count('label_correct')} | {one.count('named', backdoored=False)} |"
            f" {one.count('named')} | {one.count('named', 'label_correct')} |"
        )


def draw_roc(path: Path, rows: list[Row]) -> None:
    """The curves of all detectors; a star marks those that ran on the unlearned copy."""
    curves = {}
    for one in populations(rows):
        base = one.detector.removesuffix(UNLEARNED)
        name = base if base == one.detector else f"{base} *"
        curves[name] = roc_points(torch.tensor(one.scores), torch.tensor(one.backdoored))
    roc(path, curves, "backdoored models", "benign models")


def main() -> None:
    arguments = argument_parser().parse_args()
    rows = read_rows(arguments.table) if arguments.table.exists() else []
    if arguments.summary:
        print("\n".join(summary(rows)))
        if arguments.roc:
            draw_roc(arguments.roc, rows)
        return
    finished = {tuple(row[name] for name in MODEL) for row in rows}
    if arguments.folder:
        candidates = to_read(arguments.folder)
    else:
        candidates = to_train(arguments.preset, arguments.models)
    for candidate in candidates:
        if tuple(map(str, candidate.identity.values())) not in finished:
            add_rows(arguments.table, candidate)


def add_rows(table: Path, candidate: Candidate) -> None:
    """Add the rows of a model to the table, and print them."""
    subject = candidate.get_subject()
    common = candidate.identity | subject.columns | provenance()
    rows = [format_row(common | row, COLUMNS) for row in verdicts(subject, candidate.params)]
    upsert_rows(table, rows, COLUMNS, KEY)
    scores = [(row["detector"], row["score"], row["label"]) for row in rows]
    print(*candidate.identity.values(), subject.columns, scores, flush=True)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", type=Path, help="CSV file that takes the rows")
    add("--preset", default="demo")
    add("--models", type=int, default=20, help="of each kind")
    add("--folder", type=Path, help="take the models of the pipeline in this folder, train none")
    add("--summary", action="store_true", help="print the table of a finished population")
    add("--roc", type=Path, help="with --summary: also draw the curves to this figure")
    return parser


if __name__ == "__main__":
    main()
