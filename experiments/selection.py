"""How well each rule chooses what to prune: its effectiveness against that of an oracle, for one
finished run.

`python -m experiments.selection TABLE` runs in the folder of a finished `dvc repro evaluate` and
adds rows to the table. Every rule sees the defense set alone and works on the same masks. The
oracle goes down the ranking and takes the point with the highest DER on test images; `greedy` skips
neurons of that ranking and may be better. `--summary` prints means over the runs whose gate passed,
with 95 % t-intervals.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.settings import precision
from rnp.evaluation.metrics import (
    EvaluationSets,
    Scores,
    defense_effectiveness,
    scores_from_logits,
)
from rnp.evaluation.oracle import safe_window, threshold_of
from rnp.io.datasets import load_defense_set, load_images
from rnp.io.files import read_json, read_rows, upsert_rows
from rnp.io.models import load_model
from rnp.io.tensors import load_mask
from rnp.neurons.masks import rank_neurons
from rnp.params.read import read_params
from rnp.prune import Prune, logits_along_sweep, sorted_values, sweep, sweep_counts
from rnp.reporting.columns import format_row
from rnp.reporting.provenance import provenance
from rnp.reporting.table import interval
from rnp.training.device import use_precision

RULES = ("accuracy_drop", "prediction_change", "elbow", "outlier", "number", "threshold")
KEY = ("preset", "attack", "seed", "rule")
COLUMNS = (
    "preset",
    "attack",
    "seed",
    "gate",
    "rule",
    "clean_accuracy_before",
    "attack_success_rate_before",
    "clean_accuracy",
    "attack_success_rate",
    "der",
    "regret",
    "safe_window",
    "neurons_pruned",
    "neurons",
    "n_clean",
    "n_triggered",
    "device",
    "torch",
)


@dataclass(frozen=True)
class Choice:
    """What a rule chose: the scores on test images, and the number of pruned neurons."""

    scores: Scores
    pruned: int
    safe_window: float


def choose(folder: Path, params: dict, sets: EvaluationSets) -> tuple[dict[str, Choice], Scores]:
    """The choice of each rule and of the oracle, and the scores before."""
    backdoored, _, _ = load_model(folder / "models/backdoored.safetensors")
    mask = load_mask(folder / "models/recovered/mask.safetensors")
    clean = load_defense_set(folder / "data/defense").all
    rules = {rule: Prune(**params["prune"] | {"rule": rule}) for rule in RULES}
    order = rank_neurons(mask)
    values = sorted_values(order, mask)
    requested = {name: rule.requested_neurons(values) for name, rule in rules.items()}
    largest = {name: rule.max_neurons(mask, requested[name]) for name, rule in rules.items()}
    counts = sweep_counts(min(len(order), max(largest.values())), tuple(requested.values()))
    points = sweep(backdoored, order, values, counts, clean, precision="auto")
    logits = logits_along_sweep(
        backdoored, order, counts, sets.clean.images, sets.triggered.images, precision="auto"
    )
    scores = {}
    for n, (of_clean, of_triggered) in zip(counts, logits):
        scores[n] = scores_from_logits(
            of_clean, of_triggered, sets.clean, sets.triggered, sets.target
        )
    before = scores[0]
    effect = {n: defense_effectiveness(before, after) for n, after in scores.items()}
    chosen = {"oracle": max(effect, key=effect.__getitem__)}
    for name, rule in rules.items():
        tried = [point for point in points if point.pruned <= largest[name]]
        chosen[name] = rule.choose(tried, requested[name]).pruned
    window = safe_window(
        [{"threshold": threshold_of(values, n), **after.flat()} for n, after in scores.items()]
    )
    return {name: Choice(scores[n], n, window) for name, n in chosen.items()}, before


def choice_of_run(folder: Path, sets: EvaluationSets) -> Choice:
    """What the pipeline itself chose."""
    repaired, _, _ = load_model(folder / "models/pruned/model.safetensors")
    metrics = read_json(folder / "reports/evaluate/metrics.json")
    return Choice(sets.score(repaired), metrics["neurons_pruned"], metrics["safe_window"])


def rows(folder: Path, images: int) -> list[dict[str, object]]:
    """A row for each rule, for the rule of the run and for the oracle."""
    params = read_params(folder / "params.yaml")
    attack = read_json(folder / "data/triggered/attack.json")
    tests = load_images(folder / "data/test")
    triggered = load_images(folder / "data/triggered/test")
    sets = EvaluationSets(tests, triggered, attack["target_label"]).first(images)
    with use_precision(precision(params)):
        choices, before = choose(folder, params, sets)
        choices[params["prune"]["rule"]] = choice_of_run(folder, sets)
    best = defense_effectiveness(before, choices["oracle"].scores)
    mask = load_mask(folder / "models/recovered/mask.safetensors")
    common = {
        "preset": params["preset"],
        "attack": params["poison"]["attack"],
        "seed": params["seed"],
        "gate": attack["gate"],
        "neurons": sum(map(len, mask.values())),
        "n_clean": len(sets.clean),
        "n_triggered": len(sets.triggered),
        "clean_accuracy_before": before.clean_accuracy.value,
        "attack_success_rate_before": before.attack_success_rate.value,
    } | provenance()
    return [
        format_row(common | columns_of(rule, choice, before, best), COLUMNS)
        for rule, choice in choices.items()
    ]


def columns_of(rule: str, choice: Choice, before: Scores, best: float) -> dict[str, object]:
    der = defense_effectiveness(before, choice.scores)
    return {
        "rule": rule,
        **choice.scores.flat(),
        "der": der,
        "regret": best - der,
        "neurons_pruned": choice.pruned,
        "safe_window": choice.safe_window,
    }


def summary(table: Sequence[dict[str, str]]) -> Iterator[str]:
    """A line of a Markdown table for each rule, the one with the least regret first."""
    yield "| rule | runs | CA drop | ASR | DER | regret | worst regret | safe window | pruned |"
    yield "|---" * 9 + "|"
    passed = [row for row in table if row["gate"] == "true"]

    def values(rule: str, column: str) -> list[float]:
        return [float(row[column]) for row in passed if row["rule"] == rule]

    def mean(rule: str, column: str) -> float:
        return statistics.fmean(values(rule, column))

    rules = {row["rule"] for row in passed}
    for rule in sorted(rules, key=lambda rule: mean(rule, "regret")):
        regret = values(rule, "regret")
        drop = mean(rule, "clean_accuracy_before") - mean(rule, "clean_accuracy")
        yield (
            f"| {rule} | {len(regret)} | {drop:.3f} | {mean(rule, 'attack_success_rate'):.3f} |"
            f" {mean(rule, 'der'):.3f} | {mean(rule, 'regret'):.3f} ± {interval(regret) or 0:.3f} |"
            f" {max(regret):.3f} | {mean(rule, 'safe_window'):.2f} |"
            f" {mean(rule, 'neurons_pruned'):.0f} |"
        )


def main() -> None:
    arguments = argument_parser().parse_args()
    if arguments.summary:
        print("\n".join(summary(read_rows(arguments.table))))
        return
    new = rows(arguments.folder, arguments.images)
    upsert_rows(arguments.table, new, COLUMNS, KEY)
    for row in new:
        print(
            f"{row['rule']:10} CA {row['clean_accuracy']}  ASR {row['attack_success_rate']}  DER"
            f" {row['der']}  regret {row['regret']}  {row['neurons_pruned']} neurons"
        )


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", type=Path, help="CSV file that takes the rows; they replace those of the same run")
    add("--folder", type=Path, default=Path(), help="the folder of the run")
    add("--images", type=int, default=1000, help="test images, and as many triggered ones")
    add("--summary", action="store_true", help="print the means over runs")
    return parser


if __name__ == "__main__":
    main()
