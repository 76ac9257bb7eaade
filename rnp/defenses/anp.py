"""ANP: prune the channels through which small changes of scales and biases raise the loss most."""

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
    """Adversarial neuron pruning: masks on the scales under the worst change of scales and biases.

    Drawn at random: the order of the images, their augmentation, and the start of each ascent.

    Source: Wu and Wang, NeurIPS 2021, "Adversarial neuron pruning purifies backdoored deep models".
    Differs: fewer and smaller steps (the paper: 2,000 of 128 images), since each costs as much as
    1.5 of fine-tuning; neurons are ranked by the mask averaged over the steps, as in RNP, since
    final masks tie at 0 and 1; the shared rule decides how many neurons are pruned. The paper's
    own is `prune.rule threshold` and `prune.threshold 0.2`.
    """

    epsilon: Annotated[
        float, Interval(ge=0, le=1), "largest change of a scale or bias, as a fraction of it"
    ] = 0.4
    perturb_steps: Annotated[
        int, Gt(0), "ascent steps towards the worst change, of size epsilon / perturb_steps each"
    ] = 1
    alpha: Annotated[
        float,
        Interval(ge=0, le=1),
        "weight of the loss without change; the loss under the worst change has 1 - alpha",
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
        """The mask averaged over the steps."""
        trial = copy.deepcopy(model).requires_grad_(False).train()
        mask = {name: value.requires_grad_() for name, value in unit_mask(trial).items()}
        total = {name: torch.zeros_like(value) for name, value in mask.items()}

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            scales, biases = self.worst_change(trial, images, labels, mask, rng=rng)
            logits = forward_masked(trial, images, mask)
            changed_logits = forward_changed(trial, images, mask, scales, biases)
            loss = F.cross_entropy(logits.float(), labels)
            changed_loss = F.cross_entropy(changed_logits.float(), labels)
            return self.alpha * loss + (1 - self.alpha) * changed_loss, logits

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

    def worst_change(
        self,
        model: nn.Module,
        images: Images,
        labels: Labels,
        mask: NeuronMask,
        *,
        rng: torch.Generator,
    ) -> tuple[NeuronMask, NeuronMask]:
        """Relative changes of scales and of biases, in [-epsilon, epsilon], that raise the loss.

        They are found by an ascent along signs of the gradient, from a random start.
        """
        fixed = {name: value.detach() for name, value in mask.items()}
        scales = self._random_change(fixed, rng)
        biases = self._random_change(fixed, rng)
        free = [*scales.values(), *biases.values()]
        for _ in range(self.perturb_steps):
            logits = forward_changed(model, images, fixed, scales, biases)
            loss = F.cross_entropy(logits.float(), labels)
            for value, gradient in zip(free, torch.autograd.grad(loss, free)):
                step = self.epsilon / self.perturb_steps * gradient.sign()
                value.data.add_(step).clamp_(-self.epsilon, self.epsilon)
        for value in free:
            value.requires_grad_(False)
        return scales, biases

    def _random_change(self, mask: NeuronMask, rng: torch.Generator) -> NeuronMask:
        """A uniform draw from [-epsilon, epsilon] per neuron, which requires a gradient."""
        changes = {}
        for name, value in mask.items():
            change = torch.empty(len(value)).uniform_(-self.epsilon, self.epsilon, generator=rng)
            changes[name] = change.to(value.device).requires_grad_()
        return changes


def forward_changed(
    model: nn.Module, images: Images, mask: NeuronMask, scales: NeuronMask, biases: NeuronMask
) -> Logits:
    """The forward pass with each scale times (mask + change) and each bias times (1 + change)."""
    values = {}
    for name, layer in maskable(model).items():
        weight = model.get_parameter(f"{name}.weight")
        factor = broadcast_to_weight(mask[name] + scales[name], weight)
        values[f"{name}.weight"] = weight * factor
        if bias(layer) is not None:
            values[f"{name}.bias"] = model.get_parameter(f"{name}.bias") * (1 + biases[name])
    return functional_call(model, values, (images,))
