"""Measure CA, ASR, RA and DER of every model: the only step after training that reads the test set
and the triggers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from torch import nn

from rnp.cli.options import command
from rnp.errors import UserError
from rnp.io import load_images, load_mask, load_model, read_json, sha256, write_json, write_rows
from rnp.masks import Neuron, prune
from rnp.metrics import Scores, defence_effectiveness, judge, score
from rnp.plots import before_after, pruning_curve
from rnp.prune import cut_by_cut, grid, sorted_values
from rnp.training import Precision
from rnp.types import ImageSet


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    precision: Annotated[
        Precision, "arithmetic of the forward passes; auto takes bf16 where the hardware has it"
    ] = "auto"
    sweep_images: Annotated[
        int, "test images, and as many triggered ones, on which the oracle's sweep is run"
    ] = 2000
    sweep_fraction: Annotated[
        float, "share of the neurons in pruning order up to which the sweep goes, at least"
    ] = 0.05
    oracle_epsilon: Annotated[float, "test accuracy that the oracle may give up, as a fraction"] = (
        0.02
    )
    defences: Annotated[
        tuple[str, ...], "other defences to measure: the sections under `defences`"
    ] = ()

    def __post_init__(self) -> None:
        if self.sweep_images < 1:
            raise UserError(f"sweep_images must be at least 1, got {self.sweep_images}")
        if not 0 < self.sweep_fraction <= 1:
            raise UserError(f"sweep_fraction must be in (0, 1], got {self.sweep_fraction:g}")


@command(
    "evaluate",
    Evaluate,
    seed=False,
    outs=("defended",),
    inputs=("test", "triggered", "twin", "model", "unlearned", "masks", "pruned"),
)
def evaluate(
    options: Evaluate,
    *,
    test: Path,
    triggered: Path,
    twin: Path,
    model: Path,
    unlearned: Path,
    masks: Path,
    pruned: Path,
    defended: Path,
    report: Path,
) -> None:
    """Write metrics, the sweep over test images and the oracle point; --defended is the folder of
    other repaired models.
    """
    tests, attacked, attack = (
        load_images(test),
        load_images(triggered / "test"),
        read_json(triggered / "attack.json"),
    )
    paths = {
        "backdoored": model,
        "rnp": pruned / "model.safetensors",
        "unlearned": unlearned / "model.safetensors",
        "recovered": masks / "model.safetensors",
        "twin": twin,
        **{name: defended / f"{name}.safetensors" for name in options.defences},
    }
    scores = {
        name: measure(load_model(path)[0], tests, attacked, attack, options)
        for name, path in paths.items()
    }
    before, after = scores["backdoored"], scores["rnp"]

    victim, _, _ = load_model(model)
    mask = load_mask(masks / "mask.safetensors")
    pruning = read_json(pruned / "order.json")
    order, chosen = [(layer, index) for layer, index in pruning["order"]], pruning["pruned"]
    values = sorted_values(order, mask)
    rows = sweep(victim, order, values, tests, attacked, attack, options, chosen)
    oracle_row = choose_oracle(rows, options.oracle_epsilon)
    oracle = measure(prune(victim, order[: oracle_row["pruned"]]), tests, attacked, attack, options)
    scores["oracle"] = oracle

    write_rows(report / "sweep.csv", rows)
    pruning_curve(
        report / "pruning.png",
        rows,
        chosen=chosen,
        oracle=oracle_row["pruned"],
        n=min(options.sweep_images, len(attacked)),
    )
    before_after(
        report / "models.png", [{"model": name, **each.flat()} for name, each in scores.items()]
    )
    write_json(
        report / "metrics.json",
        {
            **after.flat(),
            "der": defence_effectiveness(before, after),
            **{f"{name}_before": value for name, value in before.flat().items()},
            "clean_accuracy_twin": scores["twin"].clean_accuracy.value,
            "intervals": {name: share.interval() for name, share in vars(after).items()},
            "n_clean": len(tests),
            "n_triggered": len(attacked),
            "gate": attack["gate"],
            "gate_reason": attack["gate_reason"],
            "attack": attack["attack"],
            "model": sha256(model),
            "neurons_pruned": chosen,
            "neurons": sum(len(value) for value in mask.values()),
            "threshold": float(values[chosen - 1]) if chosen else 0.0,
            "safe_window": safe_window(rows),
            "oracle": {**oracle.flat(), "neurons_pruned": oracle_row["pruned"]},
            "models": {
                name: {**each.flat(), "der": defence_effectiveness(before, each)}
                for name, each in scores.items()
            },
        },
    )


def measure(
    model: nn.Module, tests: ImageSet, attacked: ImageSet, attack: dict, options: Evaluate
) -> Scores:
    return score(model, tests, attacked, attack["target_label"], precision=options.precision)


def sweep(
    model: nn.Module,
    order: list[Neuron],
    values: "np.ndarray",
    tests: ImageSet,
    attacked: ImageSet,
    attack: dict,
    options: Evaluate,
    chosen: int,
) -> list[dict]:
    """CA, ASR and RA against the number of pruned neurons, on the first images of both sets (they
    are in random order).
    """
    few, few_attacked = head(tests, options.sweep_images), head(attacked, options.sweep_images)
    counts = grid(max(chosen, int(options.sweep_fraction * len(order))), (chosen,))
    logits = cut_by_cut(
        model, order, counts, few.images, few_attacked.images, precision=options.precision
    )
    return [
        {
            "pruned": n,
            "threshold": float(values[n - 1]) if n else 0.0,
            **judge(*both, few, few_attacked, attack["target_label"]).flat(),
        }
        for n, both in zip(counts, logits)
    ]


def head(data: ImageSet, n: int) -> ImageSet:
    return data.subset(torch.arange(min(n, len(data))))


def choose_oracle(rows: list[dict], epsilon: float) -> dict:
    """The lowest ASR among the points that cost at most `epsilon` of CA: what nobody without the
    trigger can know.
    """
    allowed = [row for row in rows if rows[0]["clean_accuracy"] - row["clean_accuracy"] <= epsilon]
    return min(allowed, key=lambda row: (row["attack_success_rate"], row["pruned"]))


def safe_window(rows: list[dict]) -> float:
    """Width, in mask values, of the longest run of points with ASR < 10 % and a CA drop below 3
    points.
    """
    widest, first = 0.0, None
    for row in rows:
        safe = (
            row["attack_success_rate"] < 0.1
            and rows[0]["clean_accuracy"] - row["clean_accuracy"] < 0.03
        )
        first = row["threshold"] if safe and first is None else first if safe else None
        widest = max(widest, row["threshold"] - first) if safe else widest
    return widest
