"""The pruning point that an attacker's images would choose: unattainable for a defender."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import nn

from rnp.evaluation.metrics import Scores, score, scores_from_logits
from rnp.neurons.masks import Neuron
from rnp.params.ranges import Hyperparameters
from rnp.prune import logits_along_sweep, sweep_counts
from rnp.training.device import chosen_precision
from rnp.types import ImageSet


@dataclass(frozen=True, kw_only=True)
class Evaluate(Hyperparameters):
    section: ClassVar[str] = "evaluate"

    sweep_images: Annotated[
        int, Ge(1), "test images, and as many triggered ones, on which the oracle's sweep is run"
    ] = 2000
    sweep_fraction: Annotated[
        float,
        Interval(gt=0, le=1),
        "share of the neurons in pruning order up to which the sweep goes, at least",
    ] = 0.05
    oracle_epsilon: Annotated[float, "test accuracy that the oracle may give up, as a fraction"] = (
        0.02
    )
    defenses: Annotated[
        tuple[str, ...], "other defenses to measure: the sections under `defenses`"
    ] = ()


def measure(
    model: nn.Module, tests: ImageSet, attacked: ImageSet, attack: dict, options: Evaluate
) -> Scores:
    return score(model, tests, attacked, attack["target_label"], precision=chosen_precision())


def sweep(
    model: nn.Module,
    order: list[Neuron],
    values: np.ndarray,
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
    counts = sweep_counts(max(chosen, int(options.sweep_fraction * len(order))), (chosen,))
    logits = logits_along_sweep(
        model, order, counts, few.images, few_attacked.images, precision=chosen_precision()
    )
    return [
        {
            "pruned": n,
            "threshold": float(values[n - 1]) if n else 0.0,
            **scores_from_logits(*both, few, few_attacked, attack["target_label"]).flat(),
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
