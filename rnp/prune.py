"""Prune: remove the most suspicious neurons of the original model, as the defense set allows."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from jaxtyping import UInt8
from torch import Tensor, nn

from rnp.neurons.activation_cache import ActivationCache
from rnp.neurons.masks import Neuron, bias, prune, rank_neurons, scale, zero_channel
from rnp.params.ranges import Hyperparameters
from rnp.training.device import Precision, chosen_precision
from rnp.types import ImageSet, Labels, Logits, NeuronMask

ROUNDING = 1e-9
"""Shares of images that are equal may differ by this much."""
BUDGETS: dict[str, Literal["lost", "changed"]] = {
    "accuracy_drop": "lost",
    "prediction_change": "changed",
}
"""Rules that stop where a cost first exceeds `max_accuracy_drop`, and the cost."""


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One row of a sweep: the `pruned` most suspicious neurons are removed.

    `threshold` is the largest of their masks; `accuracy` and `loss` (mean cross-entropy, in nats)
    are those on the defense set. `lost` is the paired drop in accuracy: images that become wrong
    minus images that become right, as a share of all. `changed` is the share of images whose
    predicted class differs from that of the unpruned model.
    """

    pruned: int
    threshold: float
    accuracy: float
    loss: float
    lost: float
    changed: float


@dataclass(frozen=True)
class Pruned:
    """`model` is the repaired copy, without the first `chosen.pruned` neurons of `order`.

    `order` lists the neurons in the order of pruning; `sweep` has one point for each number of
    neurons that was tried on the defense set.
    """

    model: nn.Module
    order: list[Neuron]
    sweep: list[SweepPoint]
    chosen: SweepPoint

    @property
    def neurons(self) -> list[Neuron]:
        """The pruned neurons."""
        return self.order[: self.chosen.pruned]

    def metrics(self, rule: str, mask: NeuronMask) -> dict[str, Any]:
        """The chosen point, the rule that chose it, and how many neurons each layer lost."""
        return {
            **dataclasses.asdict(self.chosen),
            "rule": rule,
            "neurons": sum(len(values) for values in mask.values()),
            "layers": dict(Counter(layer for layer, _ in self.neurons)),
        }


@dataclass(frozen=True, kw_only=True)
class Prune(Hyperparameters):
    """Rank the neurons by mask, try numbers of them on the defense set, prune by a rule.

    Source: Li et al., ICML 2023, Algorithm 1 (the pruning). The rules are ours: the published
    code makes no choice.
    Differs: the default rule, `greedy`, goes down the ranking and skips each neuron that clean
    images need. Such neurons get low masks too, above all in small networks, and one of them near
    the top would end every rule that prunes all neurons up to a point. Need is measured by
    cross-entropy: accuracy on a few hundred images is too coarse, and a choice by accuracy
    overfits them.
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
        "greedy skips neurons that clean images need; the others prune all up to a point",
    ] = "greedy"
    max_accuracy_drop: Annotated[
        float,
        Interval(ge=0, lt=1),
        "greedy, accuracy_drop: accuracy that may be lost; prediction_change: predictions that may"
        " change; as a share of the images",
    ] = 0.02
    max_loss_increase: Annotated[
        float,
        Ge(0),
        "greedy: increase of the cross-entropy on the defense set, in nats, allowed per neuron",
    ] = 0.001
    num_neurons: Annotated[int, Ge(0), "number: neurons to prune"] = 30
    threshold: Annotated[float, "threshold: prune neurons whose mask is at most this"] = 0.3
    max_fraction: Annotated[
        float,
        Interval(gt=0, le=1),
        "largest share of all neurons that may be pruned; number and threshold ignore it",
    ] = 0.1
    zero_bias: Annotated[bool, "clear the bias of a pruned channel too; the paper does not"] = False

    def __call__(self, model: nn.Module, mask: NeuronMask, clean: ImageSet) -> Pruned:
        """Nothing is drawn at random; `model` is left unchanged.

        `clean` is the whole defense set, with the images on which the masks were optimized: the
        original model was trained on none of them, and with more images the choice fits them
        less.
        """
        if self.rule == "greedy":
            order, points = self._prune_greedily(model, mask, clean)
            chosen = points[-1]
        else:
            order = rank_neurons(mask)
            points, chosen = self._sweep_and_choose(model, order, mask, clean)
        pruned = prune(model, order[: chosen.pruned], zero_bias=self.zero_bias)
        return Pruned(pruned, order, points, chosen)

    def _prune_greedily(
        self, model: nn.Module, mask: NeuronMask, clean: ImageSet
    ) -> tuple[list[Neuron], list[SweepPoint]]:
        return prune_greedily(
            model,
            rank_neurons(mask)[: self.max_neurons(mask)],
            mask,
            clean,
            self.max_accuracy_drop,
            self.max_loss_increase,
            zero_bias=self.zero_bias,
            precision=chosen_precision(),
        )

    def _sweep_and_choose(
        self, model: nn.Module, order: list[Neuron], mask: NeuronMask, clean: ImageSet
    ) -> tuple[list[SweepPoint], SweepPoint]:
        values = sorted_values(order, mask)
        requested = self.requested_neurons(values)
        largest = min(len(order), self.max_neurons(mask, requested))
        points = sweep(
            model,
            order,
            values,
            sweep_counts(largest, (requested,)),
            clean,
            zero_bias=self.zero_bias,
            precision=chosen_precision(),
            is_last=self.is_decisive,
        )
        return points, self.choose(points, requested)

    def is_decisive(self, point: SweepPoint) -> bool:
        """Whether no point behind this one can be chosen."""
        cost = BUDGETS.get(self.rule)
        return cost is not None and getattr(point, cost) > self.max_accuracy_drop + ROUNDING

    def max_neurons(self, mask: NeuronMask, requested: int = 0) -> int:
        """Upper limit on pruned neurons; `number` and `threshold` ignore `max_fraction`."""
        total = sum(len(value) for value in mask.values())
        limit = max(1, int(self.max_fraction * total))
        return max(limit, requested) if self.rule in ("number", "threshold") else limit

    def requested_neurons(self, values: np.ndarray) -> int:
        """The number of neurons that the rule derives from the ascending masks alone.

        0 for rules that use the sweep.
        """
        if self.rule == "number":
            return self.num_neurons
        if self.rule == "threshold":
            return int((values <= self.threshold).sum())
        if self.rule == "outlier":
            return int((values <= outlier_bound(values)).sum())
        return 0

    def choose(self, points: list[SweepPoint], requested: int) -> SweepPoint:
        """The point of the sweep that `rule` selects."""
        if self.rule in BUDGETS:
            return last_within_budget(points, self.max_accuracy_drop, BUDGETS[self.rule])
        if self.rule == "elbow":
            return elbow(points)
        return max((p for p in points if p.pruned <= requested), key=lambda p: p.pruned)


@torch.no_grad()
def prune_greedily(
    model: nn.Module,
    order: list[Neuron],
    mask: NeuronMask,
    data: ImageSet,
    max_accuracy_drop: float,
    max_loss_increase: float,
    *,
    zero_bias: bool = False,
    precision: Precision = "fp32",
) -> tuple[list[Neuron], list[SweepPoint]]:
    """The neurons of `order` that clean images do not need, and the point after each of them.

    A neuron is kept when its removal increases the cross-entropy on `data` by more than
    `max_loss_increase`, or when the paired drop in accuracy of all removals would exceed
    `max_accuracy_drop`.
    """
    trial = copy.deepcopy(model)
    cache = ActivationCache(trial, data.images, precision)
    measure = SweepMeter(data.labels)
    points = [measure(cache.logits(), 0, 0.0)]
    cache.commit()
    pruned: list[Neuron] = []
    for neuron in order:
        name, index = neuron
        layer = trial.get_submodule(name)
        parameters = [part for part in (scale(layer), bias(layer)) if part is not None]
        before = [part[index].clone() for part in parameters]
        zero_channel(trial, neuron, zero_bias=zero_bias)
        point = measure(cache.logits(name), len(pruned) + 1, float(mask[name][index]))
        loss_increase = point.loss - points[-1].loss
        if loss_increase <= max_loss_increase and point.lost <= max_accuracy_drop + ROUNDING:
            pruned.append(neuron)
            points.append(point)
            cache.commit()
        else:
            for part, value in zip(parameters, before):
                part[index] = value
    return pruned, points


class SweepMeter:
    """Makes sweep points from logits; the first call sets what later ones are compared with."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.reference: Labels | None = None

    def __call__(self, logits: Logits, pruned: int, threshold: float) -> SweepPoint:
        predicted = logits.argmax(1)
        if self.reference is None:
            self.reference = predicted
        correct = (predicted == self.labels).float()
        was_correct = (self.reference == self.labels).float()
        return SweepPoint(
            pruned=pruned,
            threshold=threshold,
            accuracy=correct.mean().item(),
            lost=(was_correct - correct).mean().item(),
            loss=F.cross_entropy(logits, self.labels).item(),
            changed=(predicted != self.reference).float().mean().item(),
        )


def sweep_counts(largest: int, extra: tuple[int, ...] = ()) -> list[int]:
    """Numbers of neurons to try: each up to 32, then steps of about 6 %, and those of `extra`."""
    counts = {0, largest, *(count for count in extra if count <= largest)}
    count = 1
    while count < largest:
        counts.add(count)
        count = count + 1 if count < 32 else int(count * 1.06)
    return sorted(counts)


def sorted_values(order: list[Neuron], mask: NeuronMask) -> np.ndarray:
    """The masks of the neurons of `order`."""
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
    is_last: Callable[[SweepPoint], bool] = lambda _: False,
) -> list[SweepPoint]:
    """A point for each n in `counts`: `model` on `data` without the first n neurons of `order`.

    `counts` ascend. The sweep ends with the first point that `is_last`.
    """
    measure = SweepMeter(data.labels)
    logits_by_count = logits_along_sweep(
        model, order, counts, data.images, zero_bias=zero_bias, precision=precision
    )
    points: list[SweepPoint] = []
    for count, (logits,) in zip(counts, logits_by_count):
        points.append(measure(logits, count, float(values[count - 1]) if count else 0.0))
        if is_last(points[-1]):
            break
    return points


@torch.no_grad()
def logits_along_sweep(
    model: nn.Module,
    order: list[Neuron],
    counts: list[int],
    *sets: UInt8[Tensor, "_ c h w"],
    zero_bias: bool = False,
    precision: Precision = "fp32",
) -> Iterator[tuple[Logits, ...]]:
    """For each n in `counts`, the logits of each set without the first n neurons of `order`.

    `counts` ascend. Each forward pass starts behind the last layer that has not changed, so a
    sweep costs a fraction of as many passes.
    """
    trial = copy.deepcopy(model)
    caches = [ActivationCache(trial, images, precision) for images in sets]
    pruned = 0
    for count in counts:
        for neuron in order[pruned:count]:
            zero_channel(trial, neuron, zero_bias=zero_bias)
        changed_layers = {name for name, _ in order[pruned:count]}
        yield tuple(cache.logits(*changed_layers) for cache in caches)
        for cache in caches:
            cache.commit()
        pruned = count


def last_within_budget(
    points: list[SweepPoint], budget: float, cost: Literal["lost", "changed"] = "lost"
) -> SweepPoint:
    """The last point before `cost` exceeds `budget` for the first time."""
    chosen = points[0]
    for point in points:
        if getattr(point, cost) > budget + ROUNDING:
            break
        chosen = point
    return chosen


def elbow(points: list[SweepPoint]) -> SweepPoint:
    """The point where the loss bends most: farthest below the line between the end points."""
    x = np.array([p.pruned for p in points], dtype=float)
    y = np.array([p.loss for p in points])
    span = max(x[-1] - x[0], 1.0)
    chord = y[0] + (y[-1] - y[0]) * (x - x[0]) / span
    return points[int(np.argmax(chord - y))]


def outlier_bound(values: np.ndarray, k: float = 3.5, floor: float = 0.01) -> float:
    """Masks at most this are outliers: `k` robust deviations below the median.

    The deviation is at least `floor`, since most masks are 1 and the MAD is then 0.
    """
    median = np.median(values)
    deviation = 1.4826 * np.median(np.abs(values - median))
    return float(median - k * max(deviation, floor))
