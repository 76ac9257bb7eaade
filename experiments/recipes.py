"""Do the verdicts and the repair hold on models of many recipes?

`python -m experiments.recipes TABLE` trains benign and backdoored models, each by a recipe of its
own: images, number of classes, network, optimizer, epochs and augmentation are drawn by the seed.
Then it does to each what `rnp purify` does by default: the three detectors whose verdict is taken
as evidence, alone or where all rank one class first, and `rnp_rebuild`. Each model is one row: its
recipe, CA, ASR and RA before and after, the label that each detector predicts with score and
margin, and the labels that were tuned against. Rows that the table has are not made again; with
`--models FOLDER` the trained models are kept there and are not trained again. `--summary` prints
the rows as a Markdown table instead: how many models the detectors judge, for how many each
predicts a label, for how many the labels tuned against have the right one, and what the repair
costs and removes. Backdoored models that fail the gate on ASR are not judged, and do not count; nor
do models on which the repair fails. With three classes `trigger_size` alone judges.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn

from experiments.architectures import ADAMW, SUBJECTS, Subject
from experiments.foreign import facts
from experiments.rows import add_row
from experiments.settings import configured_attack, precision
from rnp.attacks.base import Attack, backdoored_test_set
from rnp.cli.prepare import data_root
from rnp.clock import now
from rnp.data.base import Split, Splits
from rnp.data.cifar10 import Cifar10
from rnp.data.shapes import Shapes
from rnp.defenses.rnp_rebuild import (
    EVIDENCE,
    UNANIMITY,
    RNPRebuild,
    give_verdicts,
    predicted_labels,
    score_labels,
)
from rnp.detection.base import Evidence
from rnp.errors import NonFiniteLossError, UserError
from rnp.evaluation.metrics import EvaluationSets
from rnp.io.files import read_rows
from rnp.io.models import load_model, save_model
from rnp.models.build import Architecture, register_function
from rnp.params.fields import from_section
from rnp.params.presets import render
from rnp.params.read import Loader
from rnp.reporting.columns import MEASURES
from rnp.seeds import child, generator, root
from rnp.training.device import default_device, use_precision
from rnp.training.malloc import keep_freed_pages
from rnp.training.predict import accuracy
from rnp.training.recipe import Train
from rnp.types import ImageSet

ATTACKS = ("badnets", "blend", "multi", "wanet", "sig")
TRAINING_IMAGES = 6000
TEST_IMAGES = 2000
DEFENDER = 250
"""Clean images of the defender to optimize on, and as many to choose with."""
MAX_CLASS_SHARE = 0.5
"""Largest share of a class that a clean-label attack poisons."""
NAMES = tuple(detector.name for detector in EVIDENCE)
VERDICTS = (*NAMES, UNANIMITY)
KEY = ("kind", "seed")
COLUMNS = (
    *KEY,
    "attack",
    "target",
    "gate",
    "images",
    "classes",
    "network",
    "optimizer",
    "epochs",
    "augment",
    *(f"{name}_before" for name in MEASURES),
    *MEASURES,
    *(f"{name}{part}" for name in NAMES for part in ("", "_score", "_margin")),
    UNANIMITY,
    "tuned_labels",
    "unlearn_steps",
    "unlearned_accuracy",
    "neurons_pruned",
    "neurons",
    "seconds",
    "failed",
    "clean_images",
    "n_clean",
    "n_triggered",
    "device",
    "version",
    "torch",
    "made",
)
HEADINGS = (
    "models",
    "n",
    "judged",
    *VERDICTS,
    "any",
    "right",
    "CA before",
    "ASR before",
    "CA",
    "ASR",
    "RA",
    "most CA lost",
    "worst ASR",
)
Row = dict[str, str]


@dataclass(frozen=True)
class Recipe:
    """How one model is made; all but `kind` and `seed` is drawn at random."""

    kind: str
    seed: int
    attack: str
    target: int
    images: str
    classes: int
    network: str
    optimizer: str
    epochs: int
    augment: bool

    @property
    def subject(self) -> Subject:
        return SUBJECTS[self.network]

    @property
    def train(self) -> dict[str, object]:
        """The options of training; networks without BatchNorm need AdamW."""
        options: dict[str, object] = {"batch_size": 64}
        if self.optimizer == "adamw":
            options |= ADAMW
        return {
            **options,
            **self.subject.train,
            "epochs": self.epochs,
            "augment.crop": 2 * self.augment,
            "augment.flip": self.augment,
        }


def draw_recipe(kind: str, seed: int) -> Recipe:
    """The recipe of that kind and seed."""
    draw = random.Random(f"{kind} {seed}")
    images = draw.choice(("shapes", "cifar10", "both"))
    classes = 20 if images == "both" else draw.choice((3, 10))
    network = draw.choice(list(SUBJECTS))
    needs_adamw = SUBJECTS[network].train.get("optimizer") == "adamw"
    return Recipe(
        kind=kind,
        seed=seed,
        attack=draw.choice(ATTACKS) if kind == "backdoored" else "",
        target=draw.randrange(classes),
        images=images,
        classes=classes,
        network=network,
        optimizer="adamw" if needs_adamw else draw.choice(("sgd", "adamw")),
        epochs=draw.choice((5, 10, 20)),
        augment=draw.choice((True, False)),
    )


def load_splits(recipe: Recipe) -> Splits:
    """The images of each party."""
    rng = generator(recipe.seed, f"recipes/{recipe.kind}/images")
    sets = {
        "shapes": lambda: [draw_shapes(rng)],
        "cifar10": lambda: [Cifar10().load(data_root(), rng=rng)],
        "both": lambda: [Cifar10().load(data_root(), rng=rng), draw_shapes(rng)],
    }[recipe.images]()
    train, test = (join([pair[part] for pair in sets], recipe.classes) for part in (0, 1))
    split = Split(defense_train=DEFENDER, defense_val=DEFENDER)
    return split(take(train, TRAINING_IMAGES, rng), take(test, TEST_IMAGES, rng), rng=rng)


def draw_shapes(rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
    """More than are needed, so that three of the ten classes leave some thousands."""
    return Shapes(train=2 * TRAINING_IMAGES, test=2 * TEST_IMAGES).load(Path(), rng=rng)


def join(sets: Sequence[ImageSet], classes: int) -> ImageSet:
    """One data set with the classes of all, of which the first `classes` are kept.

    Those of the larger set have more images.
    """
    offset, labels = 0, []
    for one in sets:
        labels.append(one.labels + offset)
        offset += len(one.classes)
    images = torch.cat([one.images for one in sets])
    names = [name for one in sets for name in one.classes]
    joined = ImageSet(images, torch.cat(labels), tuple(names[:classes]))
    return joined.subset((joined.labels < classes).nonzero().flatten())


def take(data: ImageSet, count: int, rng: torch.Generator) -> ImageSet:
    """At most `count` images, drawn at random."""
    return data.subset(torch.randperm(len(data), generator=rng)[:count])


@dataclass(frozen=True)
class Case:
    """A trained model, the images of each party, and what it is scored on."""

    model: nn.Module
    splits: Splits
    sets: EvaluationSets | None
    """None for a benign model."""

    def score(self, model: nn.Module, suffix: str = "") -> dict[str, float]:
        """The columns of a model before or after the repair."""
        if self.sets is None:
            return {f"clean_accuracy{suffix}": accuracy(model, self.splits.test)}
        flat = self.sets.score(model).flat()
        return {f"{name}{suffix}": flat[name] for name in MEASURES}


def load_case(recipe: Recipe, params: dict, folder: Path | None) -> Case:
    """Train the model, or read it from `folder` where that has it."""
    splits = load_splits(recipe)
    if not recipe.attack:
        return Case(get_model(recipe, splits.pool, folder), splits, None)
    attack = choose_attack(recipe, params, splits.pool)
    changes = attack.poison(splits.pool, rng=generator(recipe.seed, "recipes/poison"))
    model = get_model(recipe, changes.apply(splits.pool), folder)
    triggered = backdoored_test_set(changes.trigger, splits.test, recipe.target)
    return Case(model, splits, EvaluationSets(splits.test, triggered, recipe.target))


def choose_attack(recipe: Recipe, params: dict, pool: ImageSet) -> Attack:
    """The attack, at a rate that a clean-label one can have; these attacks only change images."""
    attack = configured_attack(params, recipe.attack)
    rate = attack.poison_rate
    if attack.clean_label:
        members = (pool.labels == recipe.target).float().mean().item()
        rate = min(rate, MAX_CLASS_SHARE * members)
    return dataclasses.replace(attack, target_label=recipe.target, poison_rate=rate)


def get_model(recipe: Recipe, data: ImageSet, folder: Path | None) -> nn.Module:
    """The model that `folder` has, or a new one trained on `data`."""
    register_function(recipe.subject.arch)
    file = folder / f"{recipe.kind}-{recipe.seed}.safetensors" if folder else None
    if file and file.exists():
        return load_model(file)[0]
    rng = generator(recipe.seed, f"recipes/{recipe.kind}/train")
    architecture = from_section(Architecture, recipe.subject.options)
    model = architecture.build_for(data, rng=rng).to(default_device())
    with use_precision(recipe.subject.precision):
        model = from_section(Train, recipe.train)(model, data, rng=rng)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(file, model, architecture, data.classes)
    return model


def run(recipe: Recipe, params: dict, folder: Path | None) -> dict[str, object]:
    """Train one model, judge and repair it; the columns of its row."""
    case = load_case(recipe, params, folder)
    with use_precision(precision(params)):
        before = case.score(case.model, "_before")
        gate = passes_gate(recipe, params, before)
        columns: dict[str, object] = {}
        if gate is not False:
            try:
                columns = repair(case, recipe.seed)
            except (UserError, NonFiniteLossError) as error:
                columns = {"failed": str(error)}
    return {
        **dataclasses.asdict(recipe),
        **before,
        **columns,
        "target": recipe.target if recipe.attack else "",
        "gate": gate,
        "clean_images": len(case.splits.defense.all),
        "n_clean": len(case.splits.test),
        "n_triggered": len(case.sets.triggered) if case.sets else 0,
    }


def passes_gate(recipe: Recipe, params: dict, before: dict[str, float]) -> bool | str:
    """Whether the backdoor is real; empty for a benign model."""
    if not recipe.attack:
        return ""
    asr = before["attack_success_rate_before"]
    return asr >= configured_attack(params, recipe.attack).min_asr


def repair(case: Case, seed: int) -> dict[str, object]:
    """What `RNPRebuild.repair` does, with the verdict of each detector."""
    method, defense_set, rng = RNPRebuild(), case.splits.defense, root(seed)
    clean, start = defense_set.train, now()
    unlearned = method.unlearn(case.model, clean, rng=child(rng, "unlearn"))
    triggers = method.search.recover(case.model, clean, rng=child(rng, "triggers"))
    evidence = Evidence(case.model, triggers, unlearned.model, unlearned.trajectory)
    scores = score_labels(evidence, clean, rng=child(rng, "labels"))
    verdicts = give_verdicts(scores)
    evident = predicted_labels(verdicts.values())
    result = method.repair_from(case.model, unlearned, triggers, evident, defense_set, rng=rng)
    seconds = now() - start
    columns: dict[str, object] = {}
    for one, values in scores.items():
        columns |= {
            f"{one.name}_score": float(values.max()),
            f"{one.name}_margin": verdicts[one.name].margin,
        }
    for name, verdict in verdicts.items():
        columns[name] = "none" if verdict.label is None else verdict.label
    return {
        **columns,
        **case.score(result.model),
        **facts(result),
        "seconds": seconds,
    }


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """A Markdown table: a line for the benign models, the backdoored ones, and each attack."""
    yield f"| {' | '.join(HEADINGS)} |"
    yield "|---" * len(HEADINGS) + "|"
    counted = [row for row in rows if row["gate"] != "false" and not row["failed"]]
    for name, group in groups(counted):
        if group:
            yield f"| {' | '.join([name, *verdict_cells(group), *repair_cells(group)])} |"


def groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """The models that are judged together, by name."""
    for kind in ("benign", "backdoored"):
        yield kind, [row for row in rows if row["kind"] == kind]
    for attack in ATTACKS:
        yield attack, [row for row in rows if row["attack"] == attack]


def verdict_cells(rows: list[Row]) -> list[str]:
    """How many models there are, how many can be judged, and for how many a label is named."""
    evident = [row["tuned_labels"].split() for row in rows]
    is_backdoored = any(row["target"] for row in rows)
    right = sum(row["target"] in found for row, found in zip(rows, evident))
    return [
        str(len(rows)),
        str(sum(any(labels(row, name) is not None for name in NAMES) for row in rows)),
        *(str(sum(bool(labels(row, name)) for row in rows)) for name in VERDICTS),
        str(sum(map(bool, evident))),
        str(right) if is_backdoored else "–",
    ]


def labels(row: Row, name: str) -> list[str] | None:
    """The labels that a detector predicts; None where it cannot judge the model."""
    if row[name] == "":
        return None
    return [] if row[name] == "none" else [row[name]]


def repair_cells(rows: list[Row]) -> list[str]:
    """Means, and the worst."""

    def values(column: str) -> list[float]:
        return [float(row[column]) for row in rows if row[column] != ""]

    def show(numbers: list[float], reduce: Callable[[list[float]], float]) -> str:
        return f"{reduce(numbers):.3f}" if numbers else "–"

    pairs = zip(values("clean_accuracy_before"), values("clean_accuracy"), strict=True)
    return [
        *(show(values(f"{name}_before"), statistics.fmean) for name in MEASURES[:2]),
        *(show(values(name), statistics.fmean) for name in MEASURES),
        show([before - after for before, after in pairs], max),
        show(values("attack_success_rate"), max),
    ]


def main() -> None:
    arguments = argument_parser().parse_args()
    rows = read_rows(arguments.table) if arguments.table.exists() else []
    if arguments.summary:
        print("\n".join(summary(rows)))
        return
    keep_freed_pages()
    params = yaml.load(render("demo"), Loader)
    finished = {tuple(row[key] for key in KEY) for row in rows}
    for kind in ("benign", "backdoored"):
        for seed in range(getattr(arguments, kind)):
            if (kind, str(seed)) not in finished:
                row = run(draw_recipe(kind, seed), params, arguments.models)
                add_row(arguments.table, row, COLUMNS, KEY)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", type=Path, help="CSV file that takes the rows")
    add("--benign", type=int, default=32, help="number of benign models")
    add("--backdoored", type=int, default=16, help="number of backdoored models")
    add("--models", type=Path, help="folder that keeps the trained models")
    add("--summary", action="store_true", help="print the table of the finished models")
    return parser


if __name__ == "__main__":
    main()
