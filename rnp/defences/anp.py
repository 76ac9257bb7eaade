"""ANP: prune the channels through which small changes of scales and biases raise the error most."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rnp.augment import Augment
from rnp.defences.base import PruningDefence
from rnp.errors import UserError
from rnp.masks import bias, maskable, masked, ones, spread
from rnp.training import Precision, fit
from rnp.types import DefenceSet, Images, Labels, Logits, NeuronMask, OnEpoch, ignore


@dataclass(frozen=True, kw_only=True)
class ANP(PruningDefence):
    """Adversarial neuron pruning: masks on the scales that withstand the worst relative change of
    scales and biases.

    Source: Wu and Wang, NeurIPS 2021, "Adversarial neuron pruning purifies backdoored deep models".
    Differs: fewer and smaller steps (the paper: 2,000 of 128 images), since each costs as much as
    1.5 of fine-tuning; neurons are ranked by the mask averaged over the steps, as in RNP, since
    final masks tie at 0 and 1; the shared rule decides how many neurons go. The paper's own is
    `prune.rule threshold` and `prune.threshold 0.2`.
    """

    epsilon: Annotated[float, "largest change of a scale or bias, as a fraction of it"] = 0.4
    ascent: Annotated[
        int, "ascent steps that look for the worst change, each epsilon / ascent long"
    ] = 1
    alpha: Annotated[
        float, "weight of the error without change; the error under change has the rest"
    ] = 0.2
    lr: Annotated[float, "learning rate of the masks"] = 0.2
    momentum: Annotated[float, "SGD momentum"] = 0.9
    batch_size: Annotated[int, "images per step"] = 64
    steps: Annotated[int, "optimiser steps; mask values depend on their number"] = 400
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = (
        "auto"
    )
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        for name in ("ascent", "lr", "batch_size", "steps"):
            if not getattr(self, name) > 0:
                raise UserError(f"anp.{name} must be above 0, got {getattr(self, name):g}")
        for name in ("epsilon", "alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    f"anp.{name} must be in [0, 1], got {getattr(self, name):g}; it is a fraction,"
                    " not percent"
                )

    def score(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> NeuronMask:
        """The mask averaged over the steps. Drawn at random: images, augmentation and where each
        ascent starts.
        """
        trial = copy.deepcopy(model).requires_grad_(False).train()
        mask = {name: value.requires_grad_() for name, value in ones(trial).items()}
        total = {name: torch.zeros_like(value) for name, value in mask.items()}

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            worst = self.worst(trial, images, labels, mask, rng)
            clean, perturbed = masked(trial, images, mask), changed(trial, images, mask, *worst)
            parts = [F.cross_entropy(logits.float(), labels) for logits in (clean, perturbed)]
            return self.alpha * parts[0] + (1 - self.alpha) * parts[1], clean

        @torch.no_grad()
        def clip() -> None:
            for name, value in mask.items():
                value.clamp_(0, 1)
                total[name] += value

        fit(
            trial,
            defence_set.train,
            objective=objective,
            rng=rng,
            epochs=self.steps,
            max_steps=self.steps,
            optimiser=torch.optim.SGD(mask.values(), lr=self.lr, momentum=self.momentum),
            batch_size=self.batch_size,
            augment=self.augment,
            precision=self.precision,
            after_step=clip,
            on_epoch=on_epoch,
        )
        return {name: (value / self.steps).cpu() for name, value in total.items()}

    def worst(
        self,
        model: nn.Module,
        images: Images,
        labels: Labels,
        mask: NeuronMask,
        rng: torch.Generator,
    ) -> tuple[NeuronMask, NeuronMask]:
        """Changes of scales and biases, in [-epsilon, epsilon], after an ascent by signs from a
        random start.
        """
        fixed = {name: value.detach() for name, value in mask.items()}

        def start(value):
            return (
                torch.empty(len(value))
                .uniform_(-self.epsilon, self.epsilon, generator=rng)
                .to(value.device)
            )

        scales, biases = (
            {name: start(value).requires_grad_() for name, value in fixed.items()} for _ in range(2)
        )
        free = [*scales.values(), *biases.values()]
        for _ in range(self.ascent):
            loss = F.cross_entropy(changed(model, images, fixed, scales, biases).float(), labels)
            for value, gradient in zip(free, torch.autograd.grad(loss, free)):
                value.data.add_(self.epsilon / self.ascent * gradient.sign()).clamp_(
                    -self.epsilon, self.epsilon
                )
        return tuple(
            {name: value.detach() for name, value in each.items()} for each in (scales, biases)
        )


def changed(
    model: nn.Module, images: Images, mask: NeuronMask, scales: NeuronMask, biases: NeuronMask
) -> Logits:
    """The forward pass with each scale times (mask + change) and each bias times (1 + change)."""
    values = {}
    for name, layer in maskable(model).items():
        values[f"{name}.weight"] = layer.weight * spread(mask[name] + scales[name], layer.weight)
        if bias(layer) is not None:
            values[f"{name}.bias"] = layer.bias * (1 + biases[name])
    return functional_call(model, values, (images,))
