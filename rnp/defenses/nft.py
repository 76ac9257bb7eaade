"""NFT: optimize a soft mask on the scale of every neuron, on mixed images; no neuron is pruned."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from rnp.defenses.base import Defense, Repaired
from rnp.neurons.masks import broadcast_to_weight, forward_masked, unit_mask
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision, device_of
from rnp.training.loop import fit
from rnp.types import DefenseSet, NeuronMask, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class NFT(Defense):
    """Soft masks on the given model, each from 1 down to a floor that decreases with depth.

    Drawn at random: the order of the images, their augmentation, and how they are mixed.

    Source: Karim et al., "Augmented neural fine-tuning for efficient backdoor purification", ECCV
    2024, arXiv 2407.10052.
    Differs: length in steps; each pair is mixed in a proportion of its own, drawn uniformly;
    BatchNorm uses its running statistics, so that the model that is tuned is the one that is used.
    """

    lr: Annotated[float, Gt(0), "learning rate of the masks"] = 0.1
    momentum: Annotated[float, "SGD momentum"] = 0.9
    batch_size: Annotated[int, Gt(0), "images per step"] = 64
    steps: Annotated[int, Gt(0), "optimizer steps"] = 400
    sparsity: Annotated[
        float, Ge(0), "weight of the sum of (1 - mask), which is added to the cross-entropy"
    ] = 0.001
    floor: Annotated[float, Interval(ge=0, le=1), "smallest value of a mask, before the decay"] = (
        0.8
    )
    decay: Annotated[
        float, Ge(0), "the floor of layer i, counted from 1, is floor * exp(-decay * i)"
    ] = 0.5
    augment: Augment = Augment()

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        repaired = copy.deepcopy(model).eval()
        masks = self.masks(model, defense_set, rng=rng, on_epoch=on_epoch)
        with torch.no_grad():
            for name, mask in masks.items():
                weight = repaired.get_parameter(f"{name}.weight")
                weight.mul_(broadcast_to_weight(mask, weight))
        return Repaired(repaired)

    def masks(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> NeuronMask:
        """The factor on each scale; `model` is left unchanged."""
        trial = copy.deepcopy(model).eval().requires_grad_(False)
        device = device_of(trial)
        mask = {name: value.requires_grad_() for name, value in unit_mask(trial).items()}
        floors = [self.floor * math.exp(-self.decay * i) for i in range(1, len(mask) + 1)]

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            own_weight = torch.rand(len(images), generator=rng).to(device)
            partner = torch.randperm(len(images), generator=rng).to(device)
            own = own_weight.view(-1, 1, 1, 1)
            mixed = own * images + (1 - own) * images[partner]
            logits = forward_masked(trial, mixed, mask).float()
            own_loss = F.cross_entropy(logits, labels, reduction="none")
            partner_loss = F.cross_entropy(logits, labels[partner], reduction="none")
            loss = own_weight * own_loss + (1 - own_weight) * partner_loss
            penalty = sum((1 - value).sum() for value in mask.values())
            return loss.mean() + self.sparsity * penalty, logits

        @torch.no_grad()
        def clip() -> None:
            for floor, value in zip(floors, mask.values()):
                value.clamp_(floor, 1)

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
        return {name: value.detach() for name, value in mask.items()}
