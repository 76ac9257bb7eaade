"""Prune: take the most suspicious neurons out of the original model, as many as the defense set
allows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from jaxtyping import UInt8
from torch import Tensor, nn

from rnp.neurons.activation_cache import ActivationCache
from rnp.neurons.masks import Neuron, bias, prune, rank_neurons, zero_channel
from rnp.params.ranges import Hyperparameters
from rnp.training.device import Precision, chosen_precision
from rnp.types import ImageSet, Labels, Logits, NeuronMask


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One row of a sweep: `pruned` neurons removed, all whose mask is at most `threshold`."""

    pruned: int
    threshold: float
    accuracy: float
    loss: float
    lost: float
    """Images that turn wrong minus images that turn right, as a share of all: the paired drop in
    accuracy.
    """
    changed: float
    """Images whose predicted class is another than the unpruned model's, as a share of all."""


@dataclass(frozen=True)
class Pruned:
    """`model` is the repaired copy: the first `chosen.pruned` neurons of `order` are gone.

    `order` is the sequence in which neurons may go and `sweep` what that did on the defense set.
    """

    model: nn.Module
    order: list[Neuron]
    sweep: list[SweepPoint]
    chosen: SweepPoint

    @property
    def neurons(self) -> list[Neuron]:
        """Those that are gone."""
        return self.order[: self.chosen.pruned]


@dataclass(frozen=True, kw_only=True)
class Prune(Hyperparameters):
    """Rank by mask, sweep on the defender's own images, choose a point, cut there.

    Source: Li et al., ICML 2023, Algorithm 1 (the cut). The choice of the point is ours: the
    published code makes none.
    Differs: the default rule, `greedy`, goes down the ranking and leaves every neuron standing that
    clean images need. Such neurons get low masks too, above all in small networks, and one of them
    near the top ends every rule that prunes all neurons up to a point. Need is judged by
    cross-entropy: accuracy on a few hundred images is too coarse, and choosing neurons by it fits
    those images.
    """

    rule: Annotated[
        Literal[
            "greedy",
            "accuracy_drop",
            "prediction_change",
            "elbow",
            "outlier",
            "number",
            "threshold",
        ],
        "skip leaves out neurons that clean images need; the others prune all up to a point",
    ] = "greedy"
    max_accuracy_drop: Annotated[
        float,
        Interval(ge=0, lt=1),
        "skip, val_drop: accuracy that may be lost, divergence: predictions that may change;"
        " a share of the images",
    ] = 0.02
    max_loss_increase: Annotated[
        float,
        Ge(0),
        "skip: cross-entropy on the defense set, in nats, that the loss of one neuron may cost",
    ] = 0.001
    num_neurons: Annotated[int, Ge(0), "number: neurons to prune"] = 30
    threshold: Annotated[float, "threshold: prune neurons whose mask is at most this"] = 0.3
    max_fraction: Annotated[
        float,
        Interval(gt=0, le=1),
        "share of all neurons, the most suspicious ones, that may be pruned at all",
    ] = 0.1
    zero_bias: Annotated[bool, "clear the bias of a pruned channel too; the paper does not"] = False

    def __call__(self, model: nn.Module, mask: NeuronMask, clean: ImageSet) -> Pruned:
        """`clean` is all that the defender holds; nothing is random, `model` is left unchanged.

        The images that the masks were optimized on count too: the model that is pruned was trained
        on none of them, and the more images judge it, the less the choice fits them.
        """
        order = rank_neurons(mask)
        if self.rule == "greedy":
            order, points = prune_greedily(
                model,
                order[: self.max_neurons(mask)],
                mask,
                clean,
                self.max_accuracy_drop,
                self.max_loss_increase,
                zero_bias=self.zero_bias,
                precision=chosen_precision(),
            )
            chosen = points[-1]
        else:
            values = sorted_values(order, mask)
            named = self.requested_neurons(values)
            counts = sweep_counts(min(len(order), self.max_neurons(mask, named)), (named,))
            points = sweep(
                model,
                order,
                values,
                counts,
                clean,
                zero_bias=self.zero_bias,
                precision=chosen_precision(),
            )
            chosen = self.choose(points, named)
        return Pruned(
            prune(model, order[: chosen.pruned], zero_bias=self.zero_bias), order, points, chosen
        )

    def max_neurons(self, mask: NeuronMask, named: int = 0) -> int:
        """How many neurons may go, where the rule asks for `named`: number and threshold are not
        bound by the largest share.
        """
        share = max(1, int(self.max_fraction * sum(map(len, mask.values()))))
        return max(share, named) if self.rule in ("number", "threshold") else share

    def requested_neurons(self, values: np.ndarray) -> int:
        """How many neurons the rules ask for that look at masks alone; `values` ascend."""
        if self.rule == "number":
            return self.num_neurons
        if self.rule in ("threshold", "outlier"):
            bound = self.threshold if self.rule == "threshold" else outlier_bound(values)
            return int((values <= bound).sum())
        return 0

    def choose(self, points: list[SweepPoint], named: int) -> SweepPoint:
        """The point that `rule` takes, from the defender's sweep alone."""
        if self.rule == "accuracy_drop":
            return last_within_budget(points, self.max_accuracy_drop)
        if self.rule == "prediction_change":
            return last_within_budget(points, self.max_accuracy_drop, "changed")
        if self.rule == "elbow":
            return knee(points)
        return max((p for p in points if p.pruned <= named), key=lambda p: p.pruned)


@torch.no_grad()
def prune_greedily(
    model: nn.Module,
    order: list[Neuron],
    mask: NeuronMask,
    data: ImageSet,
    epsilon: float,
    tolerance: float,
    *,
    zero_bias: bool = False,
    precision: Precision = "fp32",
) -> tuple[list[Neuron], list[SweepPoint]]:
    """The neurons of `order` that clean images do not need, taken in this order, and the point
    that each one leads to.

    A neuron stays in the model when its loss would raise the cross-entropy on `data` by more than
    `tolerance`, or bring the paired drop in accuracy of all that went above `epsilon`.
    """
    trial, gone = copy.deepcopy(model), []
    replay, measure = ActivationCache(trial, data.images, precision), SweepMeter(data.labels)
    points = [measure(replay.logits(), 0, 0.0)]
    replay.commit()
    for neuron in order:
        layer, index = trial.get_submodule(neuron[0]), neuron[1]
        before = [
            (part, part[index].clone()) for part in (layer.weight, bias(layer)) if part is not None
        ]
        zero_channel(trial, neuron, zero_bias=zero_bias)
        point = measure(replay.logits(neuron[0]), len(gone) + 1, float(mask[neuron[0]][index]))
        if point.loss - points[-1].loss <= tolerance and point.lost <= epsilon + 1e-9:
            gone.append(neuron)
            points.append(point)
            replay.commit()
        else:
            for part, value in before:
                part[index] = value
    return gone, points


class SweepMeter:
    """Judges logits by their labels; the first ones are what the others are compared with."""

    def __init__(self, labels: Labels) -> None:
        self.labels, self.before = labels, None

    def __call__(self, logits: Logits, pruned: int, threshold: float) -> SweepPoint:
        said = logits.argmax(1)
        self.before = said if self.before is None else self.before
        right, was_right = ((each == self.labels).float() for each in (said, self.before))
        return SweepPoint(
            pruned=pruned,
            threshold=threshold,
            accuracy=right.mean().item(),
            lost=(was_right - right).mean().item(),
            loss=F.cross_entropy(logits, self.labels).item(),
            changed=(said != self.before).float().mean().item(),
        )


def sweep_counts(most: int, extra: tuple[int, ...] = ()) -> list[int]:
    """Numbers of neurons to try: every one up to 32, then steps of about 6 %."""
    counts, n = {0, most, *(e for e in extra if e <= most)}, 1
    while n < most:
        counts.add(n)
        n = n + 1 if n < 32 else int(n * 1.06)
    return sorted(counts)


def sorted_values(order: list[Neuron], mask: NeuronMask) -> np.ndarray:
    return np.array([float(mask[name][index]) for name, index in order])


@torch.no_grad()
def sweep(
    model: nn.Module,
    order: list[Neuron],
    values: np.ndarray,
    counts: list[int],
    data: ImageSet,
    *,
    zero_bias: bool = False,
    precision: Precision = "fp32",
) -> list[SweepPoint]:
    """Accuracy on `data` of `model` without the first n neurons of `order`, for each n in
    `counts`, which ascend.
    """
    measure = SweepMeter(data.labels)
    return [
        measure(logits, n, float(values[n - 1]) if n else 0.0)
        for n, (logits,) in zip(
            counts,
            logits_along_sweep(
                model, order, counts, data.images, zero_bias=zero_bias, precision=precision
            ),
        )
    ]


@torch.no_grad()
def logits_along_sweep(
    model: nn.Module,
    order: list[Neuron],
    counts: list[int],
    *sets: UInt8[Tensor, "_ c h w"],
    zero_bias: bool = False,
    precision: Precision = "fp32",
) -> Iterator[tuple[Logits, ...]]:
    """Logits of each set of images by `model` without the first n neurons of `order`, for each n
    in `counts`, which ascend.

    A forward pass starts behind the last layer that stayed the same, so that a sweep costs a
    fraction of as many passes.
    """
    trial, done = copy.deepcopy(model), 0
    replays = [ActivationCache(trial, images, precision) for images in sets]
    for n in counts:
        for neuron in order[done:n]:
            zero_channel(trial, neuron, zero_bias=zero_bias)
        changed = {layer for layer, _ in order[done:n]}
        yield tuple(replay.logits(*changed) for replay in replays)
        for replay in replays:
            replay.commit()
        done = n


def last_within_budget(
    points: list[SweepPoint], epsilon: float, cost: Literal["lost", "changed"] = "lost"
) -> SweepPoint:
    """The last point before more than `epsilon` of the accuracy is lost, or of the predictions
    changed, for the first time.
    """
    chosen = points[0]
    for point in points:
        if getattr(point, cost) > epsilon + 1e-9:
            break
        chosen = point
    return chosen


def knee(points: list[SweepPoint]) -> SweepPoint:
    """Where the curve of loss against pruned neurons bends most: farthest below the line between
    its ends.
    """
    x = np.array([p.pruned for p in points], dtype=float)
    y = np.array([p.loss for p in points])
    span = max(x[-1] - x[0], 1.0)
    chord = y[0] + (y[-1] - y[0]) * (x - x[0]) / span
    return points[int(np.argmax(chord - y))]


def outlier_bound(values: np.ndarray, k: float = 3.5, floor: float = 0.01) -> float:
    """Masks below the median by `k` robust deviations; the floor serves because most masks are 1
    and the MAD is 0.
    """
    median = np.median(values)
    mad = 1.4826 * np.median(np.abs(values - median))
    return float(median - k * max(mad, floor))
