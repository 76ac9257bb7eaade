"""How a classifier is trained, benign or backdoored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Interval
from torch import nn

from rnp.params.ranges import Hyperparameters
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision
from rnp.training.distributed import process_group
from rnp.training.loop import (
    OnBatch,
    cross_entropy,
    fit,
    make_optimizer,
    no_batch_callback,
)
from rnp.types import ImageSet, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class Train(Hyperparameters):
    """SGD with Nesterov momentum, or AdamW, with a one-cycle schedule."""

    section: ClassVar[str] = "train"

    optimizer: Annotated[
        Literal["sgd", "adamw"], "adamw suits transformers, with a learning rate near 0.001"
    ] = "sgd"
    epochs: Annotated[int, Gt(0), "passes over the training set"] = 12
    batch_size: Annotated[int, Gt(0), "images per step"] = 128
    lr: Annotated[float, Gt(0), "peak learning rate"] = 0.1
    momentum: Annotated[float, "SGD momentum"] = 0.9
    weight_decay: Annotated[float, "weight decay"] = 5e-4
    warmup_fraction: Annotated[
        float, Interval(ge=0, lt=1), "share of the run in which the learning rate rises"
    ] = 0.25
    label_smoothing: Annotated[float, "share of each label spread over all classes"] = 0.0
    resize_start: Annotated[
        float,
        Interval(gt=0, le=1),
        "factor on the side of the images at the start; below 1 training takes less time",
    ] = 1.0
    resize_end: Annotated[
        float, Interval(ge=0, lt=1), "share of the run after which images have their full size"
    ] = 0.7
    augment: Augment = Augment()

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
        on_batch: OnBatch = no_batch_callback,
    ) -> nn.Module:
        """Train `model` in place and return it in eval mode.

        Under torchrun all processes train one model together.
        Drawn at random: the order and the augmentation of the images.
        """
        with process_group(model) as group:
            fit(
                model.train(),
                data,
                objective=cross_entropy(model, self.label_smoothing),
                optimizer=self._make_optimizer(model),
                epochs=self.epochs,
                batch_size=self.batch_size,
                rng=rng,
                augment=self.augment,
                schedule=lambda epoch: one_cycle(epoch / self.epochs, self.warmup_fraction),
                image_scale=lambda epoch: progressive_size(
                    epoch / self.epochs, self.resize_start, self.resize_end
                ),
                precision=chosen_precision(),
                on_epoch=on_epoch,
                on_batch=on_batch,
                group=group,
                cuda_graph=True,
            )
        return model.eval()

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        settings = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer == "adamw":
            return make_optimizer(torch.optim.AdamW, model, **settings)
        nesterov = self.momentum > 0
        return make_optimizer(
            torch.optim.SGD, model, momentum=self.momentum, nesterov=nesterov, **settings
        )


def one_cycle(progress: float, warmup: float) -> float:
    """Factor on the peak learning rate after the share `progress` of a run.

    It rises linearly until `warmup`, then decreases linearly to 0.
    """
    if progress < warmup:
        return 0.04 + 0.96 * progress / warmup
    return (1 - progress) / (1 - warmup)


def progressive_size(progress: float, start: float, end: float) -> float:
    """Factor on the side of the images after the share `progress` of a run.

    It rises linearly from `start` to 1 at `end`.
    """
    return start + (1 - start) * progress / end if progress < end else 1.0
