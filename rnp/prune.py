"""Prune: take the most suspicious neurons out of the original model, as many as the defence set
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
from jaxtyping import UInt8
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.masks import Neuron, bias, cut, prune, ranking
from rnp.replay import Replay
from rnp.training import Precision
from rnp.types import ImageSet, Labels, Logits, NeuronMask


@dataclass(frozen=True, kw_only=True)
class Point:
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

    `order` is the sequence in which neurons may go and `sweep` what that did on the defence set.
    """

    model: nn.Module
    order: list[Neuron]
    sweep: list[Point]
    chosen: Point

    @property
    def neurons(self) -> list[Neuron]:
        """Those that are gone."""
        return self.order[: self.chosen.pruned]


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Rank by mask, sweep on the defender's own images, choose a point, cut there.

    Source: Li et al., ICML 2023, Algorithm 1 (the cut). The choice of the point is ours: the
    published code makes none.
    Differs: the default rule, `skip`, goes down the ranking and leaves every neuron standing that
    clean images need. Such neurons get low masks too, above all in small networks, and one of them
    near the top ends every rule that prunes all neurons up to a point. Need is judged by
    cross-entropy: accuracy on a few hundred images is too coarse, and choosing neurons by it fits
    those images.
    """

    rule: Annotated[
        Literal["skip", "val_drop", "divergence", "knee", "outlier", "number", "threshold"],
        "skip leaves out neurons that clean images need; the others prune all up to a point",
    ] = "skip"
    epsilon: Annotated[
        float,
        "skip, val_drop: accuracy that may be lost, divergence: predictions that may change;"
        " a share of the images",
    ] = 0.02
    tolerance: Annotated[
        float,
        "skip: cross-entropy on the defence set, in nats, that the loss of one neuron may cost",
    ] = 0.001
    number: Annotated[int, "number: neurons to prune"] = 30
    threshold: Annotated[float, "threshold: prune neurons whose mask is at most this"] = 0.3
    max_fraction: Annotated[
        float, "share of all neurons, the most suspicious ones, that may be pruned at all"
    ] = 0.1
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = (
        "fp32"
    )
    zero_bias: Annotated[bool, "clear the bias of a pruned channel too; the paper does not"] = False

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise UserError(
                f"prune.epsilon must be in [0, 1), got {self.epsilon:g}; it is a fraction, not"
                " percent"
            )
        if not 0 < self.max_fraction <= 1:
            raise UserError(f"prune.max_fraction must be in (0, 1], got {self.max_fraction:g}")
        if self.tolerance < 0:
            raise UserError(f"prune.tolerance must be 0 or more nats, got {self.tolerance:g}")
        if self.number < 0:
            raise UserError(f"prune.number must be 0 or more, got {self.number}")

    def __call__(self, model: nn.Module, mask: NeuronMask, clean: ImageSet) -> Pruned:
        """`clean` is all that the defender holds; nothing is random, `model` is left unchanged.

        The images that the masks were optimised on count too: the model that is pruned was trained
        on none of them, and the more images judge it, the less the choice fits them.
        """
        order = ranking(mask)
        if self.rule == "skip":
            order, points = harmless(
                model,
                order[: self.most(mask)],
                mask,
                clean,
                self.epsilon,
                self.tolerance,
                zero_bias=self.zero_bias,
                precision=self.precision,
            )
            chosen = points[-1]
        else:
            values = sorted_values(order, mask)
            named = self.named(values)
            counts = grid(min(len(order), self.most(mask, named)), (named,))
            points = sweep(
                model,
                order,
                values,
                counts,
                clean,
                zero_bias=self.zero_bias,
                precision=self.precision,
            )
            chosen = self.choose(points, named)
        return Pruned(
            prune(model, order[: chosen.pruned], zero_bias=self.zero_bias), order, points, chosen
        )

    def most(self, mask: NeuronMask, named: int = 0) -> int:
        """How many neurons may go, where the rule asks for `named`: number and threshold are not
        bound by the largest share.
        """
        share = max(1, int(self.max_fraction * sum(map(len, mask.values()))))
        return max(share, named) if self.rule in ("number", "threshold") else share

    def named(self, values: np.ndarray) -> int:
        """How many neurons the rules ask for that look at masks alone; `values` ascend."""
        if self.rule == "number":
            return self.number
        if self.rule in ("threshold", "outlier"):
            bound = self.threshold if self.rule == "threshold" else outlier_bound(values)
            return int((values <= bound).sum())
        return 0

    def choose(self, points: list[Point], named: int) -> Point:
        """The point that `rule` takes, from the defender's sweep alone."""
        if self.rule == "val_drop":
            return last_within(points, self.epsilon)
        if self.rule == "divergence":
            return last_within(points, self.epsilon, "changed")
        if self.rule == "knee":
            return knee(points)
        return max((p for p in points if p.pruned <= named), key=lambda p: p.pruned)


@torch.no_grad()
def harmless(
    model: nn.Module,
    order: list[Neuron],
    mask: NeuronMask,
    data: ImageSet,
    epsilon: float,
    tolerance: float,
    *,
    zero_bias: bool = False,
    precision: Precision = "fp32",
) -> tuple[list[Neuron], list[Point]]:
    """The neurons of `order` that clean images do not need, taken in this order, and the point
    that each one leads to.

    A neuron stays in the model when its loss would raise the cross-entropy on `data` by more than
    `tolerance`, or bring the paired drop in accuracy of all that went above `epsilon`.
    """
    trial, gone = copy.deepcopy(model), []
    replay, measure = Replay(trial, data.images, precision), Meter(data.labels)
    points = [measure(replay.logits(), 0, 0.0)]
    replay.keep()
    for neuron in order:
        layer, index = trial.get_submodule(neuron[0]), neuron[1]
        before = [
            (part, part[index].clone()) for part in (layer.weight, bias(layer)) if part is not None
        ]
        cut(trial, neuron, zero_bias=zero_bias)
        point = measure(replay.logits(neuron[0]), len(gone) + 1, float(mask[neuron[0]][index]))
        if point.loss - points[-1].loss <= tolerance and point.lost <= epsilon + 1e-9:
            gone.append(neuron)
            points.append(point)
            replay.keep()
        else:
            for part, value in before:
                part[index] = value
    return gone, points


class Meter:
    """Judges logits by their labels; the first ones are what the others are compared with."""

    def __init__(self, labels: Labels) -> None:
        self.labels, self.before = labels, None

    def __call__(self, logits: Logits, pruned: int, threshold: float) -> Point:
        said = logits.argmax(1)
        self.before = said if self.before is None else self.before
        right, was_right = ((each == self.labels).float() for each in (said, self.before))
        return Point(
            pruned=pruned,
            threshold=threshold,
            accuracy=right.mean().item(),
            lost=(was_right - right).mean().item(),
            loss=F.cross_entropy(logits, self.labels).item(),
            changed=(said != self.before).float().mean().item(),
        )


def grid(most: int, extra: tuple[int, ...] = ()) -> list[int]:
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
) -> list[Point]:
    """Accuracy on `data` of `model` without the first n neurons of `order`, for each n in
    `counts`, which ascend.
    """
    measure = Meter(data.labels)
    return [
        measure(logits, n, float(values[n - 1]) if n else 0.0)
        for n, (logits,) in zip(
            counts,
            cut_by_cut(model, order, counts, data.images, zero_bias=zero_bias, precision=precision),
        )
    ]


@torch.no_grad()
def cut_by_cut(
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
    replays = [Replay(trial, images, precision) for images in sets]
    for n in counts:
        for neuron in order[done:n]:
            cut(trial, neuron, zero_bias=zero_bias)
        changed = {layer for layer, _ in order[done:n]}
        yield tuple(replay.logits(*changed) for replay in replays)
        for replay in replays:
            replay.keep()
        done = n


def last_within(
    points: list[Point], epsilon: float, cost: Literal["lost", "changed"] = "lost"
) -> Point:
    """The last point before more than `epsilon` of the accuracy is lost, or of the predictions
    changed, for the first time.
    """
    chosen = points[0]
    for point in points:
        if getattr(point, cost) > epsilon + 1e-9:
            break
        chosen = point
    return chosen


def knee(points: list[Point]) -> Point:
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
