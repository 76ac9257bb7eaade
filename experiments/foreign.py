"""Does the repair work on networks that others trained?

`python -m experiments.foreign TABLE FOLDER` repairs published checkpoints of CIFAR-10.

FOLDER holds the checkpoints and `nets.py`, whose table FOREIGN names for each file the function
that builds its network, the key of the weights, mean, std, trigger (a function of bytes
[n, h, w, 3], or None for a benign model) and target. The defender has 500 of the 10,000 test
images, drawn by the seed, half of them to optimize on; the scores are those on the others. Each run
is one row: CA, ASR and RA before, after RNP's pruning and after rebuilding (`rnp_rebuild`, the
repair of `rnp purify`). Rows that the table has are not made again. `--summary` prints the rows as
a Markdown table instead, means over the seeds.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.rows import add_row
from rnp.cli.prepare import data_root
from rnp.clock import now
from rnp.data.cifar10 import Cifar10
from rnp.defenses.rnp_rebuild import RNPRebuild, RNPRebuildResult
from rnp.evaluation.metrics import EvaluationSets
from rnp.io.files import read_rows
from rnp.models.build import register_function
from rnp.reporting.columns import MEASURES
from rnp.seeds import generator, root
from rnp.training.device import use_precision
from rnp.training.malloc import keep_freed_pages
from rnp.training.predict import accuracy
from rnp.types import DefenseSet, ImageSet
from rnp.untrusted.model import load_untrusted_model, output_size

DEFENDER = 500
"""Clean images of the defender."""
STEPS = ("_before", "_pruned", "")
KEY = ("model", "seed")
COLUMNS = (
    *KEY,
    "clean_images",
    *(f"{name}{step}" for step in STEPS for name in MEASURES),
    "unlearn_steps",
    "unlearned_accuracy",
    "neurons_pruned",
    "neurons",
    "target",
    "tuned_labels",
    "seconds",
    "n_clean",
    "n_triggered",
    "device",
    "version",
    "torch",
    "made",
)
HEADINGS = (
    "checkpoint",
    "seeds",
    "CA before",
    "ASR before",
    "CA pruned",
    "ASR pruned",
    "CA",
    "ASR",
    "worst ASR",
    "RA",
    "steps",
    "pruned of",
    "label right",
    "s",
)


@dataclass(frozen=True)
class Case:
    """A published model, the defender's images, and those on which it is scored."""

    model: nn.Module
    defense_set: DefenseSet
    clean: ImageSet
    sets: EvaluationSets | None
    """None for a benign model."""

    def score(self, model: nn.Module, step: str) -> dict[str, object]:
        """The columns of one step of the repair."""
        if self.sets is None:
            return {f"clean_accuracy{step}": accuracy(model, self.clean)}
        flat = self.sets.score(model).flat()
        return {f"{name}{step}": flat[name] for name in MEASURES}


def load_case(folder: Path, file: str, seed: int) -> Case:
    """Load one checkpoint and draw the defender's images."""
    network, _, mean, std, trigger, target = importlib.import_module("nets").FOREIGN[file]
    arch = f"nets:{network.__name__}"
    register_function(arch)
    loaded = load_untrusted_model(
        folder / file, arch=arch, width=0, mean=per_channel(mean), std=per_channel(std)
    )
    output_size(loaded.model, 32)  # chooses the memory layout
    _, tests = Cifar10().load(data_root(), rng=generator(seed, "prepare"))
    order = torch.randperm(len(tests), generator=generator(seed, "foreign/images"))
    train, val, rest = order.split([DEFENDER // 2, DEFENDER // 2, len(order) - DEFENDER])
    clean = take(tests, rest)
    sets = EvaluationSets(clean, stamp(clean, trigger, target), target) if trigger else None
    return Case(loaded.model, DefenseSet(take(tests, train), take(tests, val)), clean, sets)


def per_channel(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * 3


def take(data: ImageSet, positions: Tensor) -> ImageSet:
    return ImageSet(data.images[positions], data.labels[positions], data.classes)


def stamp(clean: ImageSet, trigger: Any, target: int) -> ImageSet:
    """The images of the other classes, with the trigger."""
    others = take(clean, (clean.labels != target).nonzero().flatten())
    stamped = trigger(others.images.permute(0, 2, 3, 1).numpy())
    images = torch.from_numpy(np.ascontiguousarray(stamped.transpose(0, 3, 1, 2)))
    return ImageSet(images, others.labels, others.classes)


def run(folder: Path, file: str, seed: int) -> dict[str, object]:
    """Repair one checkpoint; the columns of its row."""
    case = load_case(folder, file, seed)
    start = now()
    with use_precision("auto"):
        result = RNPRebuild().repair(case.model, case.defense_set, rng=root(seed))
    seconds = now() - start
    return {
        "clean_images": DEFENDER,
        "seconds": seconds,
        "n_clean": len(case.clean),
        "n_triggered": len(case.sets.triggered) if case.sets else 0,
        "target": case.sets.target if case.sets else "",
        **case.score(case.model, "_before"),
        **case.score(result.rnp.model, "_pruned"),
        **case.score(result.model, ""),
        **facts(result),
    }


def facts(result: RNPRebuildResult) -> dict[str, object]:
    unlearned = result.rnp.unlearned
    return {
        "unlearn_steps": unlearned.stop_step if unlearned.reached else "",
        "unlearned_accuracy": unlearned.accuracy,
        "neurons_pruned": result.rnp.pruned.chosen.pruned,
        "neurons": sum(map(len, result.rnp.recovered.mask.values())),
        "tuned_labels": " ".join(map(str, result.tuned_labels)),
    }


def summary(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """A Markdown table: a line for each checkpoint."""
    yield f"| {' | '.join(HEADINGS)} |"
    yield "|---" * len(HEADINGS) + "|"
    for model in dict.fromkeys(row["model"] for row in rows):
        yield f"| {model} | {' | '.join(cells([r for r in rows if r['model'] == model]))} |"


def cells(runs: Sequence[dict[str, str]]) -> list[str]:
    """The number of seeds, and means over them."""

    def mean(column: str, digits: int = 3) -> str:
        values = [float(row[column]) for row in runs if row[column] != ""]
        return f"{statistics.fmean(values):.{digits}f}" if values else "–"

    rates = [row["attack_success_rate"] for row in runs]
    is_benign = not runs[0]["target"]
    right = sum(row["target"] in row["tuned_labels"].split() for row in runs)
    accused = sum(row["tuned_labels"] != "" for row in runs)
    label = f"{accused} accused" if is_benign else f"{right} of {len(runs)}"
    return [
        str(len(runs)),
        *(mean(f"{name}_before") for name in MEASURES[:2]),
        *(mean(f"{name}_pruned") for name in MEASURES[:2]),
        *(mean(name) for name in MEASURES[:2]),
        "–" if is_benign else f"{max(map(float, rates)):.3f}",
        mean("robust_accuracy"),
        mean("unlearn_steps", 0),
        f"{mean('neurons_pruned', 0)} of {mean('neurons', 0)}",
        label,
        mean("seconds", 0),
    ]


def main() -> None:
    arguments = argument_parser().parse_args()
    rows = read_rows(arguments.table) if arguments.table.exists() else []
    if arguments.summary:
        print("\n".join(summary(rows)))
        return
    keep_freed_pages()
    sys.path.insert(0, str(arguments.folder))
    finished = {tuple(row[key] for key in KEY) for row in rows}
    for seed in arguments.seeds:
        for file in importlib.import_module("nets").FOREIGN:
            if (file, str(seed)) not in finished:
                row = {"model": file, "seed": seed} | run(arguments.folder, file, seed)
                add_row(arguments.table, row, COLUMNS, KEY)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", type=Path, help="CSV file that takes the rows")
    add("folder", type=Path, nargs="?", help="folder of the checkpoints and nets.py")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--summary", action="store_true", help="print the table of finished runs")
    return parser


if __name__ == "__main__":
    main()
