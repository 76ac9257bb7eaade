"""What a defence is: a model and the defender's clean images in, a repaired model out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import nn

from rnp.prune import Point, Prune
from rnp.registry import Method
from rnp.types import DefenceSet, NeuronMask, OnEpoch, ignore


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
    def repair(self, model: nn.Module, defence_set: DefenceSet, *, rng: torch.Generator, on_epoch: OnEpoch = ignore) -> Repaired:
        """`model` is left unchanged; everything random comes from `rng`."""


@dataclass(frozen=True, kw_only=True)
class PruningDefence(Defence):
    """A defence that is a score per neuron; the pruning is shared, so that only the ranking differs."""

    prune: Prune = Prune()

    @abstractmethod
    def score(self, model: nn.Module, defence_set: DefenceSet, *, rng: torch.Generator, on_epoch: OnEpoch = ignore) -> NeuronMask:
        """One value per neuron, low = suspicious."""

    def repair(self, model: nn.Module, defence_set: DefenceSet, *, rng: torch.Generator, on_epoch: OnEpoch = ignore) -> Repaired:
        pruned = self.prune(model, self.score(model, defence_set, rng=rng, on_epoch=on_epoch), defence_set.both)
        return Repaired(pruned.model, pruned.sweep, pruned.chosen)


def highest_first(values: NeuronMask) -> NeuronMask:
    """A score from values that are high where suspicious: deviations below the mean of the layer, so that layers compare."""
    below = lambda value: (value.mean() - value) / value.std(correction=0).clamp_min(1e-12)
    return {name: below(value).cpu() for name, value in values.items()}
