"""Score every model, and find the pruning that an oracle with the attacker's images would choose.

The oracle's choice is unattainable for a defender.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Interval
from torch import nn

from rnp.evaluation.metrics import (
    EvaluationSets,
    Scores,
    defense_effectiveness,
    scores_from_logits,
)
from rnp.neurons.masks import Neuron, prune
from rnp.params.ranges import Hyperparameters
from rnp.prune import logits_along_sweep, sorted_values, sweep_counts
from rnp.training.device import chosen_precision
from rnp.types import NeuronMask

SweepRow = dict[str, float]
"""The number of pruned neurons, the mask value of the last of them, and CA, ASR and RA."""
SAFE_ASR = 0.1
SAFE_DROP = 0.03


@dataclass(frozen=True, kw_only=True)
class Evaluate(Hyperparameters):
    """Size of the oracle's sweep, and the defenses to score."""

    section: ClassVar[str] = "evaluate"

    sweep_images: Annotated[
        int, Ge(1), "test images, and as many triggered ones, for the sweep of the oracle"
    ] = 2000
    sweep_fraction: Annotated[
        float,
        Interval(gt=0, le=1),
        "share of the neurons, in pruning order, that the sweep covers at least",
    ] = 0.05
    oracle_epsilon: Annotated[float, "test accuracy that the oracle may give up, as a fraction"] = (
        0.02
    )
    defenses: Annotated[
        tuple[str, ...], "other defenses to score: the sections under `defenses`"
    ] = ()


@dataclass(frozen=True)
class PruningOrder:
    """All neurons in the order of pruning, their mask, and how many of them RNP pruned."""

    neurons: list[Neuron]
    mask: NeuronMask
    pruned: int

    @property
    def values(self) -> np.ndarray:
        """The mask values in the order of pruning."""
        return sorted_values(self.neurons, self.mask)


@dataclass(frozen=True)
class Evaluation:
    """The scores of each model, by name, and the sweep from which the oracle chose."""

    scores: dict[str, Scores]
    sets: EvaluationSets
    pruning: PruningOrder
    sweep: list[SweepRow]
    oracle_pruned: int

    def metrics(self) -> dict[str, object]:
        """All numbers by name: those of the repaired model first, then those of every model."""
        before = self.scores["backdoored"]
        after = self.scores["rnp"]
        pruned = self.pruning.pruned
        return {
            **after.flat(),
            "der": defense_effectiveness(before, after),
            **{f"{name}_before": value for name, value in before.flat().items()},
            "clean_accuracy_benign": self.scores["benign"].clean_accuracy.value,
            "intervals": {name: fraction.interval() for name, fraction in vars(after).items()},
            "n_clean": len(self.sets.clean),
            "n_triggered": len(self.sets.triggered),
            "neurons_pruned": pruned,
            "neurons": sum(len(value) for value in self.pruning.mask.values()),
            "threshold": threshold_of(self.pruning.values, pruned),
            "safe_window": safe_window(self.sweep),
            "oracle": {**self.scores["oracle"].flat(), "neurons_pruned": self.oracle_pruned},
            "models": {
                name: {**scores.flat(), "der": defense_effectiveness(before, scores)}
                for name, scores in self.scores.items()
            },
        }


def evaluate_models(
    models: Iterable[tuple[str, nn.Module]],
    backdoored: nn.Module,
    pruning: PruningOrder,
    sets: EvaluationSets,
    options: Evaluate,
) -> Evaluation:
    """Score all models, the oracle's among them.

    Args:
        models: Names and networks, each of which is scored before the next one is taken; the
            names `backdoored`, `rnp` and `benign` must be among them.
        backdoored: The model that the oracle prunes.
    """
    scores = {name: sets.score(model) for name, model in models}
    rows = sweep(backdoored, pruning, sets, options)
    oracle_pruned = int(choose_oracle(rows, options.oracle_epsilon)["pruned"])
    scores["oracle"] = sets.score(prune(backdoored, pruning.neurons[:oracle_pruned]))
    return Evaluation(scores, sets, pruning, rows, oracle_pruned)


def sweep(
    model: nn.Module, pruning: PruningOrder, sets: EvaluationSets, options: Evaluate
) -> list[SweepRow]:
    """CA, ASR and RA against the number of pruned neurons, on the first images of both sets."""
    first = sets.first(options.sweep_images)
    values = pruning.values
    largest = max(pruning.pruned, int(options.sweep_fraction * len(pruning.neurons)))
    counts = sweep_counts(largest, (pruning.pruned,))
    logits_by_count = logits_along_sweep(
        model,
        pruning.neurons,
        counts,
        first.clean.images,
        first.triggered.images,
        precision=chosen_precision(),
    )
    return [
        {
            "pruned": n,
            "threshold": threshold_of(values, n),
            **scores_from_logits(
                clean, triggered, first.clean, first.triggered, first.target
            ).flat(),
        }
        for n, (clean, triggered) in zip(counts, logits_by_count)
    ]


def threshold_of(values: np.ndarray, pruned: int) -> float:
    """The mask value of the last pruned neuron; 0 where none is pruned."""
    return float(values[pruned - 1]) if pruned else 0.0


def choose_oracle(rows: list[SweepRow], epsilon: float) -> SweepRow:
    """The lowest ASR among the rows that cost at most `epsilon` of CA."""
    allowed = [row for row in rows if rows[0]["clean_accuracy"] - row["clean_accuracy"] <= epsilon]
    return min(allowed, key=lambda row: (row["attack_success_rate"], row["pruned"]))


def safe_window(rows: list[SweepRow]) -> float:
    """Width, in mask values, of the longest run of safe rows.

    Safe are an ASR below 10 % and a CA drop below 3 points.
    """
    widest = 0.0
    first = None
    for row in rows:
        drop = rows[0]["clean_accuracy"] - row["clean_accuracy"]
        if row["attack_success_rate"] >= SAFE_ASR or drop >= SAFE_DROP:
            first = None
            continue
        if first is None:
            first = row["threshold"]
        widest = max(widest, row["threshold"] - first)
    return widest
