"""How a classifier is trained, benign or backdoored."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Interval
from torch import nn

from rnp.params.ranges import Hyperparameters
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision
from rnp.training.distributed import process_group
from rnp.training.loop import OnBatch, cross_entropy, fit, make_optimizer
from rnp.types import (
    ImageSet,
    OnEpoch,
    no_callback,
)


@dataclass(frozen=True, kw_only=True)
class Train(Hyperparameters):
    """How a classifier is trained, benign or backdoored: SGD with Nesterov momentum, or AdamW, on
    a one-cycle schedule.
    """

    section: ClassVar[str] = "train"

    optimizer: Annotated[
        Literal["sgd", "adamw"], "adamw serves transformers, with a learning rate near .001"
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
        "side of the images at the start, as a share of their own; below 1 the run takes less time",
    ] = 1.0
    resize_end: Annotated[
        float, Interval(ge=0, lt=1), "share of the run after which they have their own side"
    ] = 0.7
    augment: Augment = field(default_factory=Augment)

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
        on_batch: OnBatch = lambda positions, labels, logits: None,
    ) -> nn.Module:
        """Train `model` in place and return it in eval mode; under torchrun all processes train
        one model.
        """
        if self.optimizer == "adamw":
            optimizer = make_optimizer(
                torch.optim.AdamW, model, lr=self.lr, weight_decay=self.weight_decay
            )
        else:
            optimizer = make_optimizer(
                torch.optim.SGD,
                model,
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.momentum > 0,
                weight_decay=self.weight_decay,
            )
        with process_group(model) as together:
            fit(
                model.train(),
                data,
                objective=cross_entropy(model, self.label_smoothing),
                optimizer=optimizer,
                epochs=self.epochs,
                batch_size=self.batch_size,
                rng=rng,
                augment=self.augment,
                schedule=lambda epoch: one_cycle(epoch / self.epochs, self.warmup_fraction),
                side=lambda epoch: progressive_size(
                    epoch / self.epochs, self.resize_start, self.resize_end
                ),
                precision=chosen_precision(),
                on_epoch=on_epoch,
                on_batch=on_batch,
                together=together,
                graphed=True,
            )
        return model.eval()


def one_cycle(done: float, warm_up: float) -> float:
    """Factor on the peak learning rate after the share `done` of a run: a straight rise, then a
    straight fall to 0.
    """
    return (0.04 + 0.96 * done / warm_up) if done < warm_up else (1 - done) / (1 - warm_up)


def progressive_size(done: float, start: float, until: float) -> float:
    """Factor on the side of the images after the share `done` of a run: a straight rise from
    `start` to 1 at `until`.
    """
    return start + (1 - start) * done / until if done < until else 1.0
