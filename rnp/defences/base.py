"""What a defence is: a model and the defender's clean images in, a repaired model out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import nn

from rnp.augment import Augment
from rnp.errors import UserError
from rnp.prune import Point, Prune
from rnp.registry import Method
from rnp.training import Objective, Precision, cross_entropy, fit, steps_per_epoch
from rnp.types import DefenceSet, ImageSet, NeuronMask, OnEpoch, ignore

UNLEARNED = "_unlearned"
"""The end of a name: what is before it names the defence of which this is the variant with the
unlearned model.

The two draw the same random numbers, so that they differ by the unlearned model alone.
"""


@dataclass(frozen=True)
class Repaired:
    """`model` is a new network; `sweep` and `chosen` are there for pruning defences only."""

    model: nn.Module
    sweep: list[Point] = field(default_factory=list)
    chosen: Point | None = None


@dataclass(frozen=True, kw_only=True)
class Defence(Method, ABC):
    """Repairs a model with clean images alone; it does not learn which attack it faces."""

    @abstractmethod
    def repair(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> Repaired:
        """`model` is left unchanged; everything random comes from `rng`."""


@dataclass(frozen=True, kw_only=True)
class TuningDefence(Defence):
    """A defence that ends in fine-tuning all weights: SGD on half a cosine, its length in steps."""

    lr: Annotated[float, "learning rate of the fine-tuning at its start"] = 0.01
    momentum: Annotated[float, "SGD momentum"] = 0.9
    weight_decay: Annotated[float, "SGD weight decay"] = 5e-4
    batch_size: Annotated[int, "images per step"] = 64
    steps: Annotated[int, "optimiser steps of the fine-tuning"] = 800
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = (
        "auto"
    )
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        for name in ("lr", "batch_size", "steps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{self.name}.{name} must be above 0, got {getattr(self, name):g}")

    def tune(
        self,
        model: nn.Module,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        objective: Objective | None = None,
        steps: int | None = None,
        after_step: Callable[[], None] = lambda: None,
        on_epoch: OnEpoch = ignore,
    ) -> nn.Module:
        """Change `model` in place and return it in eval mode. Without an `objective` it is the
        cross-entropy.
        """
        steps, per_epoch = steps or self.steps, steps_per_epoch(len(clean), self.batch_size)
        fit(
            model.train(),
            clean,
            objective=objective or cross_entropy(model),
            rng=rng,
            epochs=steps,
            max_steps=steps,
            optimiser=torch.optim.SGD(
                model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay
            ),
            batch_size=self.batch_size,
            augment=self.augment,
            precision=self.precision,
            after_step=after_step,
            on_epoch=on_epoch,
            schedule=lambda epoch: (
                (1 + math.cos(math.pi * min(1.0, epoch * per_epoch / steps))) / 2
            ),
        )
        return model.eval()


@dataclass(frozen=True, kw_only=True)
class PruningDefence(Defence):
    """A defence that is a score per neuron; the pruning is shared, so that only the ranking
    differs.
    """

    prune: Prune = Prune()

    @abstractmethod
    def score(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> NeuronMask:
        """One value per neuron, low = suspicious."""

    def repair(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> Repaired:
        pruned = self.prune(
            model, self.score(model, defence_set, rng=rng, on_epoch=on_epoch), defence_set.both
        )
        return Repaired(pruned.model, pruned.sweep, pruned.chosen)


def highest_first(values: NeuronMask) -> NeuronMask:
    """A score from values that are high where suspicious: deviations below the mean of the layer,
    so that layers compare.
    """

    def below(value):
        return (value.mean() - value) / value.std(correction=0).clamp_min(1e-12)

    return {name: below(value).cpu() for name, value in values.items()}
