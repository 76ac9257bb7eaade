"""The interface of a defense: a model and the defender's clean images in, a repaired model out.

A defense is one file in this folder that defines one frozen dataclass. The name of the file is the
name of the defense, and its fields are the options of `rnp defend`. Which method the author writes
depends on the base class:

| base class       | you write                           | you get                              |
|------------------|-------------------------------------|--------------------------------------|
| `Defense`        | `repair` -> `Repaired`              | sub-command, options, contract tests |
| `TuningDefense`  | `repair`, which calls `tune`        | also SGD, its schedule and options   |
| `PruningDefense` | `score` -> `NeuronMask`             | also `repair`, with the sweep        |

A low value of a `NeuronMask` is suspicious. The class docstring names `Source:`, and where they
apply `Drawn at random:` and `Differs:`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from rnp.prune import Prune, SweepPoint
from rnp.registry import Method
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision
from rnp.training.loop import Objective, cross_entropy, fit, half_cosine, steps_per_epoch
from rnp.types import DefenseSet, ImageSet, NeuronMask, OnEpoch, no_callback

UNLEARNED = "_unlearned"
"""The suffix of a variant that uses the unlearned model; the rest of its name is the defense that
it is a variant of.

Both draw the same random numbers, so that they differ by the unlearned model alone.
"""


@dataclass(frozen=True)
class Repaired:
    """The repaired model, and what the defense found on the way to it."""

    model: nn.Module
    """A new network in eval mode, of the same architecture."""
    sweep: list[SweepPoint] = field(default_factory=list)
    """What each number of pruned neurons does on the defense set; empty if none was tried."""
    chosen: SweepPoint | None = None
    """The point at which the model was pruned; None for defenses that do not prune."""
    tuned_labels: list[int] | None = None
    """The labels whose triggers the model was trained to ignore; None for defenses that look for
    no label."""


@dataclass(frozen=True, kw_only=True)
class Defense(Method, ABC):
    """A method that repairs a model with clean images alone; it does not know the attack."""

    @abstractmethod
    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        """Return a repaired copy of `model`.

        Args:
            model: The suspicious classifier; it is left unchanged.
            defense_set: Clean images, which are left unchanged.
            rng: The source of all random numbers.
            on_epoch: Called after each epoch of training.
        """


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
        """Fine-tune `model` in place and return it in eval mode.

        Drawn at random: the order of the images and their augmentation.

        Args:
            objective: The loss; cross-entropy by default.
            steps: Optimizer steps in place of the option `steps`.
        """
        steps = steps or self.steps
        per_epoch = steps_per_epoch(len(clean), self.batch_size)

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
            schedule=half_cosine(steps, per_epoch),
        )
        return model.eval()


@dataclass(frozen=True, kw_only=True)
class PruningDefense(Defense):
    """A defense that scores neurons; the pruning is shared, so that only the ranking differs."""

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
        """One value per neuron, low = suspicious; `model` is left unchanged."""

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        score = self.score(model, defense_set, rng=rng, on_epoch=on_epoch)
        pruned = self.prune(model, score, defense_set.all)
        return Repaired(pruned.model, pruned.sweep, pruned.chosen)


def suspicion_to_score(values: NeuronMask) -> NeuronMask:
    """Turn values that are high where suspicious into scores that compare across layers.

    The score of a neuron is the number of standard deviations by which its value is below the mean
    of its layer.
    """

    def below_mean(value: Tensor) -> Tensor:
        return (value.mean() - value) / value.std(correction=0).clamp_min(1e-12)

    return {name: below_mean(value).cpu() for name, value in values.items()}
