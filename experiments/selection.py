"""How well each rule chooses what to prune: its effectiveness against that of an oracle, for one
finished run.

Run it in the folder of a finished `dvc repro evaluate`; rows are added to the table. Every rule
sees the defense set alone and works on the same masks. The oracle goes down the ranking and takes
the point with the highest DER on test images; `greedy` leaves neurons out of that ranking and may do
better. `--summary` prints means over the runs whose gate passed, with 95 % t-intervals.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from rnp.evaluation.metrics import defense_effectiveness, head, score, scores_from_logits
from rnp.evaluation.oracle import safe_window
from rnp.io.datasets import load_defense_set, load_images
from rnp.io.files import upsert_rows, read_json, read_rows
from rnp.io.models import load_model
from rnp.io.tensors import load_mask
from rnp.neurons.masks import rank_neurons
from rnp.params.read import read_params
from rnp.prune import Prune, logits_along_sweep, sweep_counts, sorted_values, sweep
from rnp.reporting.provenance import provenance
from rnp.reporting.rows import format_row
from rnp.reporting.table import interval, mean

RULES = ("accuracy_drop", "prediction_change", "elbow", "outlier", "number", "threshold")
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
KEY = ("preset", "attack", "seed", "rule")


def rows(folder: Path, images: int) -> list[dict[str, object]]:
    params = read_params(folder / "params.yaml")
    victim, _, _ = load_model(folder / "models/backdoored.safetensors")
    repaired, _, _ = load_model(folder / "models/pruned/model.safetensors")
    mask, clean = (
        load_mask(folder / "models/recovered/mask.safetensors"),
        load_defense_set(folder / "data/defense").all,
    )
    tests, attacked = (
        head(load_images(folder / "data" / part), images) for part in ("test", "triggered/test")
    )
    attack, done = (
        read_json(folder / name)
        for name in ("data/triggered/attack.json", "reports/evaluate/metrics.json")
    )

    rules = {rule: Prune(**params["prune"] | {"rule": rule}) for rule in RULES}
    order = rank_neurons(mask)
    values = sorted_values(order, mask)
    named = {name: rule.named(values) for name, rule in rules.items()}
    most = {name: rule.most(mask, named[name]) for name, rule in rules.items()}
    counts = sweep_counts(min(len(order), max(most.values())), tuple(named.values()))
    points = sweep(victim, order, values, counts, clean, precision="auto")
    each = logits_along_sweep(
        victim, order, counts, tests.images, attacked.images, precision="auto"
    )
    scores = {
        n: scores_from_logits(*logits, tests, attacked, attack["target_label"])
        for n, logits in zip(counts, each)
    }
    before = scores[0]
    effect = {n: defense_effectiveness(before, after) for n, after in scores.items()}
    best = max(effect, key=effect.__getitem__)

    chosen = {"oracle": best} | {
        name: (
            rule.choose(
                [point for point in points if point.pruned <= most[name]], named[name]
            ).pruned
        )
        for name, rule in rules.items()
    }
    width = safe_window(
        [
            {"threshold": float(values[n - 1]) if n else 0.0, **after.flat()}
            for n, after in scores.items()
        ]
    )
    found = {rule: (scores[n], n, width) for rule, n in chosen.items()}
    found[params["prune"]["rule"]] = (
        score(repaired, tests, attacked, attack["target_label"], precision="auto"),
        done["neurons_pruned"],
        done["safe_window"],
    )
    common = {
        "preset": params["preset"],
        "attack": params["poison"]["attack"],
        "seed": params["seed"],
        "gate": attack["gate"],
        "neurons": len(order),
        "n_clean": len(tests),
        "n_triggered": len(attacked),
        "clean_accuracy_before": before.clean_accuracy.value,
        "attack_success_rate_before": before.attack_success_rate.value,
    } | provenance()
    return [
        format_row(
            common
            | {
                "rule": rule,
                **after.flat(),
                "der": (der := defense_effectiveness(before, after)),
                "regret": effect[best] - der,
                "neurons_pruned": count,
                "safe_window": window,
            },
            COLUMNS,
        )
        for rule, (after, count, window) in found.items()
    ]


def summary(table: Sequence[dict[str, str]]) -> Iterator[str]:
    """A line of a Markdown table for each rule, the one with the least regret first."""
    yield "| rule | runs | CA drop | ASR | DER | regret | worst regret | safe window | pruned |"
    yield "|---" * 9 + "|"
    passed = [row for row in table if row["gate"] == "true"]

    def of(rule, name):
        return [float(row[name]) for row in passed if row["rule"] == rule]

    for rule in sorted({row["rule"] for row in passed}, key=lambda rule: mean(of(rule, "regret"))):
        before, after, asr, der, window, pruned = (
            mean(of(rule, name))
            for name in (
                "clean_accuracy_before",
                "clean_accuracy",
                "attack_success_rate",
                "der",
                "safe_window",
                "neurons_pruned",
            )
        )
        regret = of(rule, "regret")
        yield (
            f"| {rule} | {len(regret)} | {before - after:.3f} | {asr:.3f} | {der:.3f} |"
            f" {mean(regret):.3f} ± {interval(regret) or 0:.3f} | {max(regret):.3f} | {window:.2f}"
            f" | {pruned:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "table",
        type=Path,
        help="CSV file that takes the rows, in place of older ones of the same run",
    )
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help="test images, and as many triggered ones, that rules are judged on",
    )
    parser.add_argument("--summary", action="store_true", help="print the means over runs")
    arguments = parser.parse_args()
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


if __name__ == "__main__":
    main()
