"""ANP: prune the channels through which small changes of scales and biases raise the error most."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Interval
from torch import Tensor, nn
from torch.func import functional_call

from rnp.defenses.base import PruningDefense
from rnp.neurons.masks import bias, broadcast_to_weight, forward_masked, maskable, unit_mask
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision
from rnp.training.loop import fit
from rnp.types import DefenseSet, Images, Labels, Logits, NeuronMask, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class ANP(PruningDefense):
    """Adversarial neuron pruning: masks on the scales that withstand the worst relative change of
    scales and biases.

    Source: Wu and Wang, NeurIPS 2021, "Adversarial neuron pruning purifies backdoored deep models".
    Differs: fewer and smaller steps (the paper: 2,000 of 128 images), since each costs as much as
    1.5 of fine-tuning; neurons are ranked by the mask averaged over the steps, as in RNP, since
    final masks tie at 0 and 1; the shared rule decides how many neurons go. The paper's own is
    `prune.rule threshold` and `prune.threshold 0.2`.
    """

    epsilon: Annotated[
        float, Interval(ge=0, le=1), "largest change of a scale or bias, as a fraction of it"
    ] = 0.4
    perturb_steps: Annotated[
        int, Gt(0), "ascent steps that look for the worst change, each epsilon / ascent long"
    ] = 1
    alpha: Annotated[
        float,
        Interval(ge=0, le=1),
        "weight of the error without change; the error under change has the rest",
    ] = 0.2
    lr: Annotated[float, Gt(0), "learning rate of the masks"] = 0.2
    momentum: Annotated[float, "SGD momentum"] = 0.9
    batch_size: Annotated[int, Gt(0), "images per step"] = 64
    steps: Annotated[int, Gt(0), "optimizer steps; mask values depend on their number"] = 400
    augment: Augment = Augment()

    def score(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> NeuronMask:
        """The mask averaged over the steps. Drawn at random: images, augmentation and where each
        ascent starts.
        """
        trial = copy.deepcopy(model).requires_grad_(False).train()
        mask = {name: value.requires_grad_() for name, value in unit_mask(trial).items()}
        total = {name: torch.zeros_like(value) for name, value in mask.items()}

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            worst = self.worst(trial, images, labels, mask, rng)
            clean, perturbed = (
                forward_masked(trial, images, mask),
                changed(trial, images, mask, *worst),
            )
            parts = [F.cross_entropy(logits.float(), labels) for logits in (clean, perturbed)]
            return self.alpha * parts[0] + (1 - self.alpha) * parts[1], clean

        @torch.no_grad()
        def clip() -> None:
            for name, value in mask.items():
                value.clamp_(0, 1)
                total[name] += value

        fit(
            trial,
            defense_set.train,
            objective=objective,
            rng=rng,
            epochs=self.steps,
            max_steps=self.steps,
            optimizer=torch.optim.SGD(mask.values(), lr=self.lr, momentum=self.momentum),
            batch_size=self.batch_size,
            augment=self.augment,
            precision=chosen_precision(),
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
        for _ in range(self.perturb_steps):
            loss = F.cross_entropy(changed(model, images, fixed, scales, biases).float(), labels)
            for value, gradient in zip(free, torch.autograd.grad(loss, free)):
                value.data.add_(self.epsilon / self.perturb_steps * gradient.sign()).clamp_(
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
        values[f"{name}.weight"] = layer.weight * broadcast_to_weight(
            mask[name] + scales[name], layer.weight
        )
        if bias(layer) is not None:
            values[f"{name}.bias"] = layer.bias * (1 + biases[name])
    return functional_call(model, values, (images,))
