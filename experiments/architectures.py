"""Does RNP work on networks of every kind? `python -m experiments.architectures TABLE` trains one
of each with a backdoor and repairs it.

Data, attack, unlearning, recovery and pruning are those of a preset, the same for all; width and
training are those of the table below. `rnp_rebuild`, the repair of `rnp purify`, repairs the given
model too, with an unlearning, a recovery and a pruning of its own. Each run is one row: CA, ASR and
RA before, after RNP and after `rnp_rebuild`, with the DER of both, the neurons, and the seconds of
the steps of RNP and of all of `rnp_rebuild`. Rows that the table has are not made again.
`--summary` prints the rows as a Markdown table instead, means over the seeds whose backdoor passed
its gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from benchmarks.timing import with_clock
from experiments.rows import add_row
from experiments.settings import configured, configured_attack, precision, split_data
from rnp.attacks.base import Attack, backdoored_test_set
from rnp.clock import Clock
from rnp.data.base import Splits
from rnp.defenses.rnp import RNP
from rnp.defenses.rnp_rebuild import RNPRebuild
from rnp.errors import NonFiniteLossError, UserError
from rnp.evaluation.metrics import EvaluationSets, defense_effectiveness
from rnp.io.files import read_rows
from rnp.models.build import Architecture, register_function
from rnp.params.fields import from_section
from rnp.params.presets import render
from rnp.params.read import Loader, flatten
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.reporting.columns import MEASURES
from rnp.seeds import child, generator, root
from rnp.training.device import Precision, default_device, use_precision
from rnp.training.malloc import keep_freed_pages
from rnp.training.recipe import Train
from rnp.unlearn import Unlearn

COMMON: dict[str, object] = {"augment.flip": False}
"""Training as in the preset, but without the mirror image, which would move the corner patch as a
shift would: with it half of these networks learned no backdoor.
"""
ADAMW: dict[str, object] = {"optimizer": "adamw", "weight_decay": 0.05, "lr": 0.001}
EFFICIENTNET = "experiments.architectures:quarter_efficientnet"


@dataclass(frozen=True)
class Subject:
    """An architecture, at a width at which training takes a minute or two on two cores."""

    arch: str
    width: int = 0
    train: dict[str, object] = field(default_factory=dict)
    precision: Precision = "auto"
    """That of its training; the other steps have the preset's."""

    @property
    def options(self) -> dict[str, object]:
        width = {"width": self.width} if self.width else {}
        return {"arch": self.arch, **width}


# Milliseconds a step on two cores (AMD EPYC) in fp32 and bf16: EfficientNet 83 and 191, MobileNetV2
# 127 and 162, ViT 74 and 116. vgg19_bn knows a seventh of the triggered images after 10 epochs.
SUBJECTS = {
    "resnet18": Subject("resnet18", 12),
    "preactresnet18": Subject("preactresnet18", 12),
    "wrn16_1": Subject("wrn16_1", 16),
    "vgg19_bn": Subject("vgg19_bn", 12, {"epochs": 16}),
    "mobilenet_v2": Subject("mobilenet_v2", 8, precision="fp32"),
    "efficientnet_b0": Subject(EFFICIENTNET, precision="fp32"),
    "resnet18_gn": Subject("resnet18_gn", 12, ADAMW, "fp32"),
    "vgg11": Subject("vgg11", 24, ADAMW, "fp32"),
    "convnext": Subject("convnext", 24, ADAMW | {"lr": 0.002}, "fp32"),
    "vit": Subject("vit", 48, ADAMW | {"epochs": 20}, "fp32"),
}
ATTACKS = ("badnets", "blend")
STEPS = ("train", "unlearn", "recover", "prune", "rnp_rebuild")
KEY = ("preset", "architecture", "attack", "seed")
COLUMNS = (
    *KEY,
    "arch",
    "width",
    "gate",
    *(f"{name}_before" for name in MEASURES),
    "unlearned_accuracy",
    *MEASURES,
    "der",
    *(f"{name}_rnp_rebuild" for name in (*MEASURES, "der")),
    "neurons_pruned",
    "neurons",
    "tuned_labels",
    *(f"seconds_{step}" for step in STEPS),
    "failed",
    "n_clean",
    "n_triggered",
    "device",
    "version",
    "torch",
    "made",
)
HEADINGS = (
    "architecture",
    "attack",
    "seeds",
    "gate",
    "CA before",
    "ASR before",
    "CA",
    "ASR",
    "CA, rnp_rebuild",
    "ASR, rnp_rebuild",
    "pruned of",
    *(f"s {step}" for step in STEPS),
)


def quarter_efficientnet(num_classes: int) -> nn.Module:
    """torchvision's EfficientNet-B0 at a quarter of its width.

    Of the 21,008 neurons at full width 4,200 would be tried one by one.
    """
    from torchvision.models import EfficientNet
    from torchvision.models.efficientnet import MBConvConfig

    # expansion, side of the kernel, stride, channels in and out, repeats: table 1 of Tan and Le,
    # ICML 2019
    stages = (
        (1, 3, 1, 32, 16, 1),
        (6, 3, 2, 16, 24, 2),
        (6, 5, 2, 24, 40, 2),
        (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3),
        (6, 5, 2, 112, 192, 4),
        (6, 3, 1, 192, 320, 1),
    )
    blocks: Any = [MBConvConfig(*stage, width_mult=0.25) for stage in stages]
    net: Any = EfficientNet(blocks, dropout=0.2, num_classes=num_classes)
    net.features[0][0].stride = (1, 1)  # five halvings of 32 pixels a side would leave one
    return net


@dataclass(frozen=True)
class Backdoored:
    """A backdoored model, and the images on which it is scored."""

    model: nn.Module
    splits: Splits
    sets: EvaluationSets


def run(params: dict, name: str, attack: str, seed: int) -> dict[str, object]:
    """One architecture, trained with a backdoor and repaired; the columns of its row.

    If RNP cannot repair it, the reason is in the column `failed`.
    """
    subject = SUBJECTS[name]
    method = configured_attack(params, attack)
    clock = Clock()
    with use_precision(precision(params)):
        with clock("train"):
            backdoored = train(params, subject, method, name, seed)
        row = columns_before(backdoored, subject, method)
        try:
            for columns in repair(params, backdoored, clock, seed):
                row |= columns
        except (UserError, NonFiniteLossError) as error:
            row["failed"] = str(error)
    return row | {f"seconds_{step}": seconds for step, seconds in clock.seconds.items()}


def train(params: dict, subject: Subject, attack: Attack, name: str, seed: int) -> Backdoored:
    """Train one architecture with a backdoor."""
    splits = split_data(params, seed)
    register_function(subject.arch)
    architecture = from_section(Architecture, subject.options)
    recipe = from_section(Train, dict(flatten(params["train"])) | COMMON | subject.train)
    rng = generator(seed, f"architectures/{name}")
    model = architecture.build_for(splits.pool, rng=rng).to(default_device())
    changes = attack.poison(splits.pool, rng=generator(seed, "poison"))
    data = changes.apply(splits.pool)
    with use_precision(subject.precision):
        model, trigger = attack.train(model, data, changes.trigger, recipe, rng=rng)
    triggered = backdoored_test_set(trigger, splits.test, attack.target)
    return Backdoored(model, splits, EvaluationSets(splits.test, triggered, attack.target))


def columns_before(backdoored: Backdoored, subject: Subject, attack: Attack) -> dict[str, object]:
    before = backdoored.sets.score(backdoored.model)
    return {
        **{f"{key}_before": before.flat()[key] for key in MEASURES},
        "arch": subject.arch,
        "width": subject.width,
        "gate": before.attack_success_rate.value >= attack.min_asr,
        "n_clean": len(backdoored.sets.clean),
        "n_triggered": len(backdoored.sets.triggered),
    }


def repair(
    params: dict, backdoored: Backdoored, clock: Clock, seed: int
) -> Iterator[dict[str, object]]:
    """Repair the model by RNP and by `rnp_rebuild`; the columns as they become known."""
    model = backdoored.model
    defense_set = backdoored.splits.defense
    rnp = timed_rnp(params, clock)
    rng = root(seed)
    unlearned = rnp.unlearn(model, defense_set.train, rng=child(rng, "unlearn"))
    yield {"unlearned_accuracy": unlearned.accuracy}
    result = rnp.repair_from(model, unlearned, defense_set, rng=rng)
    masks = result.recovered.mask
    yield {"neurons_pruned": result.pruned.chosen.pruned, "neurons": sum(map(len, masks.values()))}
    with clock("rnp_rebuild"):
        rebuild: RNPRebuild = configured(RNPRebuild, params, "defenses", "rnp_rebuild.")
        rebuilt = rebuild.repair(model, defense_set, rng=rng)
    yield {"tuned_labels": " ".join(map(str, rebuilt.tuned_labels))}
    before = backdoored.sets.score(model)
    for after, suffix in ((result.model, ""), (rebuilt.model, "_rnp_rebuild")):
        scores = backdoored.sets.score(after)
        yield {f"{key}{suffix}": scores.flat()[key] for key in MEASURES}
        yield {f"der{suffix}": defense_effectiveness(before, scores)}


def timed_rnp(params: dict, clock: Clock) -> RNP:
    """RNP up to the stop of its unlearning, whose steps are timed."""
    unlearn = configured(Unlearn, params, "unlearn", until_collapse=False)
    return RNP(
        unlearn=with_clock(unlearn, clock, "unlearn"),
        recover=with_clock(configured(Recover, params, "recover"), clock, "recover"),
        prune=with_clock(configured(Prune, params, "prune"), clock, "prune"),
    )


def summary(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """A Markdown table: a line for each architecture and attack."""
    yield f"| {' | '.join(HEADINGS)} |"
    yield "|---" * len(HEADINGS) + "|"
    for name, attack in dict.fromkeys((row["architecture"], row["attack"]) for row in rows):
        runs = [row for row in rows if (row["architecture"], row["attack"]) == (name, attack)]
        yield f"| {' | '.join([name, attack, *cells(runs)])} |"


def cells(runs: Sequence[dict[str, str]]) -> list[str]:
    """The seeds of one architecture and attack, how many passed the gate, and means over them."""
    passed = [row for row in runs if row["gate"] == "true"]
    repaired = [row for row in passed if not row["failed"]]
    counts = [str(len(runs)), f"{len(passed)} of {len(runs)}"]
    if not repaired:
        reason = passed[0]["failed"] if passed else ""
        return [*counts, reason, *[""] * (len(HEADINGS) - 5)]

    def mean(key: str) -> float:
        return sum(float(row[key]) for row in repaired) / len(repaired)

    measured = [
        f"{name}{when}"
        for when in ("_before", "", "_rnp_rebuild")
        for name in ("clean_accuracy", "attack_success_rate")
    ]
    return [
        *counts,
        *(f"{mean(key):.3f}" for key in measured),
        f"{mean('neurons_pruned'):.0f} of {mean('neurons'):.0f}",
        *(f"{mean(f'seconds_{step}'):.0f}" for step in STEPS),
    ]


def main() -> None:
    arguments = argument_parser().parse_args()
    rows = read_rows(arguments.table) if arguments.table.exists() else []
    if arguments.summary:
        print("\n".join(summary(rows)))
        return
    keep_freed_pages()
    params = yaml.load(render(arguments.preset), Loader)
    finished = {tuple(row[key] for key in KEY) for row in rows}
    for seed in arguments.seeds:
        for attack in arguments.attacks:
            for name in arguments.only:
                key = (arguments.preset, name, attack, str(seed))
                if key not in finished:
                    row = dict(zip(KEY, key)) | run(params, name, attack, seed)
                    add_row(arguments.table, row, COLUMNS, KEY)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", type=Path, help="CSV file that takes the rows")
    add("--preset", default="demo")
    known = list(SUBJECTS)
    text = ", ".join(known)
    add("--only", nargs="+", choices=known, default=known, metavar="NAME", help=text)
    add("--attacks", nargs="+", choices=ATTACKS, default=["badnets"])
    add("--seeds", nargs="+", type=int, default=[0])
    add("--summary", action="store_true", help="print the table of finished runs")
    return parser


if __name__ == "__main__":
    main()
