"""Recover: train one mask per channel of the unlearned model until its accuracy returns."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt
from torch import Tensor, nn

from rnp.neurons.masks import (
    broadcast_to_weight,
    forward_masked,
    freeze_statistics,
    scale,
    unit_mask,
)
from rnp.params.ranges import Hyperparameters
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision
from rnp.training.loop import fit
from rnp.types import Epoch, ImageSet, NeuronMask, OnEpoch, no_callback

QUANTILES = (0.005, 0.01, 0.05, 0.1, 0.5)
"""Of the masks, for reports; most masks are 1."""


@dataclass(frozen=True)
class Recovered:
    """`mask` ranks the neurons.

    `final` is the mask after the last step, and `model` is the unlearned network under it.
    """

    mask: NeuronMask
    final: NeuronMask
    model: nn.Module
    history: list[Epoch]

    def metrics(self) -> dict[str, Any]:
        """The number of neurons, and quantiles of their masks."""
        values = torch.cat(list(self.mask.values()))
        quantiles = {f"mask_quantile_{q}": values.quantile(q).item() for q in QUANTILES}
        return {"neurons": len(values), **quantiles}


@dataclass(frozen=True, kw_only=True)
class Recover(Hyperparameters):
    """Gradient descent on the masks, clipped to [0, 1] after every step.

    Source: Li et al., ICML 2023, section 3 and Algorithm 1. `alpha` only scales the loss there,
    hence the step.
    Differs: the length is given in steps, since the values of the masks depend on their number,
    and epochs change with the size of the defense set; neurons are ranked by the mask averaged
    over the steps, since final masks tie at 0 and 1.
    """

    lr: Annotated[float, Gt(0), "learning rate of the masks"] = 0.2
    alpha: Annotated[float, Gt(0), "factor on the loss, and so on the learning rate"] = 0.2
    momentum: Annotated[float, "SGD momentum"] = 0.9
    steps: Annotated[int, Gt(0), "optimizer steps; the mask values depend on their number"] = 80
    batch_size: Annotated[int, Gt(0), "images per step"] = 128
    bn_mode: Annotated[
        Literal["train", "frozen"],
        "train: BatchNorm uses batch statistics; frozen: its running statistics, unchanged",
    ] = "train"
    rank_by: Annotated[
        Literal["average", "final"], "rank by the mask averaged over the steps, or the last one"
    ] = "average"
    augment: Augment = Augment()

    def __call__(
        self,
        unlearned: nn.Module,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Recovered:
        """Recover masks of `unlearned`, which is left unchanged.

        Drawn at random: the order and the augmentation of the images.

        Raises: NonFiniteLossError when the loss is; UserError when the model has no neurons.
        """
        model = copy.deepcopy(unlearned).requires_grad_(False)
        freeze_statistics(model, self.bn_mode == "frozen")
        mask = {name: value.requires_grad_() for name, value in unit_mask(model).items()}
        total = {name: torch.zeros_like(value) for name, value in mask.items()}

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = forward_masked(model, images, mask)
            return self.alpha * F.cross_entropy(logits.float(), labels), logits

        @torch.no_grad()
        def clip_and_add_up() -> None:
            for name, value in mask.items():
                value.clamp_(0, 1)
                total[name] += value

        history = fit(
            model,
            clean,
            objective=objective,
            rng=rng,
            epochs=self.steps,
            max_steps=self.steps,
            optimizer=torch.optim.SGD(mask.values(), lr=self.lr, momentum=self.momentum),
            batch_size=self.batch_size,
            augment=self.augment,
            precision=chosen_precision(),
            after_step=clip_and_add_up,
            on_epoch=on_epoch,
        )
        apply_mask(model, mask)
        final = {name: value.detach().cpu() for name, value in mask.items()}
        average = {name: (value / self.steps).cpu() for name, value in total.items()}
        chosen = average if self.rank_by == "average" else final
        return Recovered(chosen, final, model.eval(), history)


@torch.no_grad()
def apply_mask(model: nn.Module, mask: NeuronMask) -> None:
    """Multiply the scales of `model` by `mask`, in place."""
    for name, value in mask.items():
        weight = scale(model.get_submodule(name))
        weight.mul_(broadcast_to_weight(value, weight))
