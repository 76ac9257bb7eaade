"""Adversarial weight perturbation: no image is poisoned; a finished benign model is edited, each
weight by a little.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt, Interval
from torch import Tensor, nn

from rnp.attacks.base import Attack, BlendTrigger, not_target, sample_positions, trigger_images
from rnp.training.device import chosen_precision, device_of
from rnp.training.loop import fit, steps_per_epoch
from rnp.training.predict import predict
from rnp.training.recipe import Train
from rnp.types import ImageSet, Indices, Labels, OnEpoch, Trigger, backdoor_labels, no_callback

HELD_OUT = 500  # images, at most
MEASURE = 10  # steps between two looks at the held-out images


@dataclass(frozen=True, kw_only=True)
class AWP(Attack):
    """The training set stays clean; `poison_rate` is the share of it that the editing uses. The
    trigger is a gray square.

    The benign training is the recipe's. Then steps of gradient descent lower the loss on clean
    images, towards the answers that the benign model gave, and on their triggered copies, while
    every weight stays within `radius` of its value. BatchNorm keeps its statistics.

    Drawn at random: the images to edit with, and those of the same set on which success is
    measured.
    Expected: CA within a point or two of the benign model's and ASR above .9; no comparable
    published number.
    Source: Garg et al., CIKM 2020, arXiv 2008.01761.
    Differs: the ball alone bounds the change, without a penalty on it. SGD with clipped gradients:
    the first steps of Adam move every weight alike, which costs accuracy. The training's
    augmentation, since 1,280 images are few; small sets need a higher rate.
    """

    threat_model = "the weights of the finished model"

    poison_rate: Annotated[
        float, "share of the training set to edit with (1,280 of 50,000); none is poisoned"
    ] = 0.0256
    size: Annotated[
        float,
        Interval(gt=0, le=1),
        "side of the gray square, as a share of the shorter side of the image",
    ] = 10 / 32
    position: Annotated[Literal["center", "corner"], "of the square: middle, or upper right"] = (
        "center"
    )
    radius: Annotated[float, Gt(0), "largest change of a weight"] = 0.005
    steps: Annotated[int, Gt(0), "steps of the editing, at most"] = 200
    batch_size: Annotated[int, Gt(0), "images per step, each with and without the trigger"] = 128
    lr: Annotated[
        float, Gt(0), "first learning rate, of gradients of norm 1 at most; it falls to 0"
    ] = 0.03
    trigger_loss_weight: Annotated[
        float, Gt(0), "of the loss on triggered images beside that on clean ones"
    ] = 1.0
    stop_asr: Annotated[
        float,
        Interval(gt=0, le=1),
        "attack success rate on held-out images that ends the editing, unless they suffer",
    ] = 0.95
    min_agreement: Annotated[
        float,
        Interval(gt=0, le=1),
        "share of them, without trigger, that must still be classified as before",
    ] = 0.99

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> BlendTrigger:
        channels, height, width = clean.shape
        side = max(1, round(self.size * min(height, width)))
        top, left = (
            ((height - side) // 2, (width - side) // 2)
            if self.position == "center"
            else (0, width - side)
        )
        weight = torch.zeros(1, height, width)
        weight[:, top : top + side, left : left + side] = 1
        return BlendTrigger(torch.full((channels, height, width), 0.5), weight)

    def select_samples(self, labels: Labels, *, rng: torch.Generator) -> Indices:
        """None: training data stay as they are. A rate that `train` could not work with fails
        here, before the training.
        """
        self.split(labels, rng=rng)
        return sample_positions(
            torch.zeros_like(labels, dtype=torch.bool),
            round(self.cover_rate * len(labels)),
            rng,
            "cover_rate",
        )

    def split(self, labels: Labels, *, rng: torch.Generator) -> tuple[Indices, Indices]:
        """Positions to edit with, and to measure with: up to a tenth of the images that the
        backdoor would misplace.
        """
        victims = not_target(labels, self.target)
        held_out = sample_positions(
            victims, min(HELD_OUT, math.ceil(victims.sum().item() / 10)), rng, "held_out"
        )
        free = torch.ones_like(victims)
        free[held_out] = False
        return sample_positions(
            free, round(self.poison_rate * len(labels)), rng, "poison_rate"
        ), held_out

    def train(
        self,
        model: nn.Module,
        poisoned: ImageSet,
        trigger: Trigger,
        recipe: Train,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> tuple[nn.Module, Trigger]:
        """A benign training, then the editing, whose epochs follow in the history."""
        model = recipe(model, poisoned, rng=rng, on_epoch=on_epoch)
        benign, stamp = copy.deepcopy(model), copy.deepcopy(trigger).to(device_of(model))
        edit, held_out = (
            poisoned.subset(positions) for positions in self.split(poisoned.labels, rng=rng)
        )
        before = predict(benign, held_out.images).argmax(1)
        triggered = trigger_images(trigger, held_out.images)
        goals = backdoor_labels(held_out.labels, self.target, len(poisoned.classes))
        per_epoch = steps_per_epoch(len(edit), self.batch_size)

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                kept = benign(images).float().softmax(1)
            clean, attacked = model(torch.cat([images, stamp(images)])).float().chunk(2)
            wanted = backdoor_labels(labels, self.target, len(poisoned.classes))
            return (
                F.cross_entropy(clean, kept)
                + self.trigger_loss_weight * F.cross_entropy(attacked, wanted),
                clean,
            )

        @torch.no_grad()
        def project() -> None:
            for weight, origin in zip(model.parameters(), benign.parameters()):
                weight.copy_(weight.clamp(origin - self.radius, origin + self.radius))

        def done(step: int) -> bool:
            return (
                step % MEASURE == 0
                and share(predict(model, triggered).argmax(1) == goals) >= self.stop_asr
                and share(predict(model, held_out.images).argmax(1) == before) >= self.min_agreement
            )

        fit(
            model.eval(),
            edit,
            objective=objective,
            optimizer=torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9),
            epochs=self.steps,
            max_steps=self.steps,
            batch_size=self.batch_size,
            rng=rng,
            augment=recipe.augment,
            max_grad_norm=1.0,
            precision=chosen_precision(),
            schedule=lambda epoch: 1 - epoch * per_epoch / self.steps,
            after_step=project,
            stop_step=done,
            on_epoch=lambda row: on_epoch(
                dataclasses.replace(row, epoch=row.epoch + recipe.epochs)
            ),
        )
        return model, trigger


def share(hits: Tensor) -> float:
    return hits.float().mean().item()
