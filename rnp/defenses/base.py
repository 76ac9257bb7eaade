"""What a defense is: a model and the defender's clean images in, a repaired model out."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Gt
from torch import nn

from rnp.prune import Prune, SweepPoint
from rnp.registry import Method
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision
from rnp.training.loop import Objective, cross_entropy, fit, steps_per_epoch
from rnp.types import DefenseSet, ImageSet, NeuronMask, OnEpoch, no_callback

UNLEARNED = "_unlearned"
"""The end of a name: what is before it names the defense of which this is the variant with the
unlearned model.

The two draw the same random numbers, so that they differ by the unlearned model alone.
"""


@dataclass(frozen=True)
class Repaired:
    """`model` is a new network; `sweep` and `chosen` are there for pruning defenses only."""

    model: nn.Module
    sweep: list[SweepPoint] = field(default_factory=list)
    chosen: SweepPoint | None = None


@dataclass(frozen=True, kw_only=True)
class Defense(Method, ABC):
    """Repairs a model with clean images alone; it does not learn which attack it faces."""

    @abstractmethod
    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        """`model` is left unchanged; everything random comes from `rng`."""


@dataclass(frozen=True, kw_only=True)
class TuningDefense(Defense):
    """A defense that ends in fine-tuning all weights: SGD on half a cosine, its length in steps."""

    lr: Annotated[float, Gt(0), "learning rate of the fine-tuning at its start"] = 0.01
    momentum: Annotated[float, "SGD momentum"] = 0.9
    weight_decay: Annotated[float, "SGD weight decay"] = 5e-4
    batch_size: Annotated[int, Gt(0), "images per step"] = 64
    steps: Annotated[int, Gt(0), "optimizer steps of the fine-tuning"] = 800
    augment: Augment = Augment()

    def tune(
        self,
        model: nn.Module,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        objective: Objective | None = None,
        steps: int | None = None,
        after_step: Callable[[], None] = lambda: None,
        on_epoch: OnEpoch = no_callback,
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
            optimizer=torch.optim.SGD(
                model.parameters(), self.lr, self.momentum, weight_decay=self.weight_decay
            ),
            batch_size=self.batch_size,
            augment=self.augment,
            precision=chosen_precision(),
            after_step=after_step,
            on_epoch=on_epoch,
            schedule=lambda epoch: (
                (1 + math.cos(math.pi * min(1.0, epoch * per_epoch / steps))) / 2
            ),
        )
        return model.eval()


@dataclass(frozen=True, kw_only=True)
class PruningDefense(Defense):
    """A defense that is a score per neuron; the pruning is shared, so that only the ranking
    differs.
    """

    prune: Prune = Prune()

    @abstractmethod
    def score(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> NeuronMask:
        """One value per neuron, low = suspicious."""

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        pruned = self.prune(
            model, self.score(model, defense_set, rng=rng, on_epoch=on_epoch), defense_set.all
        )
        return Repaired(pruned.model, pruned.sweep, pruned.chosen)


def suspicion_to_score(values: NeuronMask) -> NeuronMask:
    """A score from values that are high where suspicious: deviations below the mean of the layer,
    so that layers compare.
    """

    def below(value):
        return (value.mean() - value) / value.std(correction=0).clamp_min(1e-12)

    return {name: below(value).cpu() for name, value in values.items()}
