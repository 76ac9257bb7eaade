"""NFT: tune the scale of every neuron on mixed images; suspicious neurons fade, none is cut off."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp.augment import Augment
from rnp.defences.base import Defence, Repaired
from rnp.errors import UserError
from rnp.masks import masked, ones, spread
from rnp.training import Precision, device_of, fit
from rnp.types import DefenceSet, NeuronMask, OnEpoch, ignore


@dataclass(frozen=True, kw_only=True)
class NFT(Defence):
    """Soft masks on the given model, each between a floor that falls from layer to layer, and 1.

    Drawn at random: the images of each step, their augmentation, and how they are mixed.

    Source: Karim et al., "Augmented neural fine-tuning for efficient backdoor purification", ECCV
    2024, arXiv 2407.10052.
    Differs: length in steps; each pair is mixed by a share of its own, drawn evenly; BatchNorm on
    its running statistics, so that the model that is tuned is the one that is used.
    """

    lr: Annotated[float, "learning rate of the masks"] = 0.1
    momentum: Annotated[float, "SGD momentum"] = 0.9
    batch_size: Annotated[int, "images per step"] = 64
    steps: Annotated[int, "optimiser steps"] = 400
    weight: Annotated[float, "of the sum of (1 - mask) beside the cross-entropy"] = 0.001
    floor: Annotated[float, "smallest mask of a layer, before the decay"] = 0.8
    decay: Annotated[float, "the floor of layer i, from 1, is floor * exp(-decay * i)"] = 0.5
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = (
        "auto"
    )
    augment: Augment = Augment()

    def __post_init__(self) -> None:
        for name in ("lr", "batch_size", "steps"):
            if not getattr(self, name) > 0:
                raise UserError(f"nft.{name} must be above 0, got {getattr(self, name):g}")
        if not 0 <= self.floor <= 1:
            raise UserError(f"nft.floor must be in [0, 1], got {self.floor:g}")
        for name in ("weight", "decay"):
            if getattr(self, name) < 0:
                raise UserError(f"nft.{name} must be 0 or more, got {getattr(self, name):g}")

    def repair(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> Repaired:
        repaired, mask = (
            copy.deepcopy(model).eval(),
            self.masks(model, defence_set, rng=rng, on_epoch=on_epoch),
        )
        with torch.no_grad():
            for name, value in mask.items():
                weight = repaired.get_submodule(name).weight
                weight.mul_(spread(value, weight))
        return Repaired(repaired)

    def masks(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> NeuronMask:
        """What each scale is multiplied by."""
        trial, device = copy.deepcopy(model).eval().requires_grad_(False), device_of(model)
        mask = {name: value.requires_grad_() for name, value in ones(trial).items()}
        floors = [self.floor * math.exp(-self.decay * i) for i in range(1, len(mask) + 1)]

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            shares = torch.rand(len(images), generator=rng).to(device)
            other = torch.randperm(len(images), generator=rng).to(device)
            keep = shares.view(-1, 1, 1, 1)
            logits = masked(trial, keep * images + (1 - keep) * images[other], mask).float()
            error = shares * F.cross_entropy(logits, labels, reduction="none")
            error = error + (1 - shares) * F.cross_entropy(logits, labels[other], reduction="none")
            return (
                error.mean() + self.weight * sum((1 - value).sum() for value in mask.values()),
                logits,
            )

        @torch.no_grad()
        def clip() -> None:
            for floor, value in zip(floors, mask.values()):
                value.clamp_(floor, 1)

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
        return {name: value.detach() for name, value in mask.items()}
