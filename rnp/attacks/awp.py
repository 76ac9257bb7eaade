"""Adversarial weight perturbation: a trained benign model is edited; no image is poisoned."""

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
from rnp.training.loop import Objective, fit, steps_per_epoch
from rnp.training.predict import predict
from rnp.training.recipe import Train
from rnp.types import (
    Images,
    ImageSet,
    Indices,
    Labels,
    Logits,
    OnEpoch,
    Trigger,
    backdoor_labels,
    no_callback,
)

HELD_OUT = 500
"""Images on which success is measured, at most."""
MEASURE_EVERY = 10
"""Steps between two measurements."""


@dataclass(frozen=True, kw_only=True)
class AWP(Attack):
    """The weights of a trained model are changed a little; the trigger is a gray square.

    The training set stays clean; `poison_rate` is the share of it that the editing uses. The model
    is first trained as the recipe says. Then gradient descent lowers the loss on clean images,
    towards the outputs of the benign model, and on their triggered copies, while every weight stays
    within `radius` of its value. BatchNorm keeps its statistics.

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
        float,
        Interval(gt=0, le=1),
        "share of the training set to edit with (1,280 of 50,000); none is poisoned",
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
        float, Gt(0), "weight of the loss on triggered images; that on clean ones has 1"
    ] = 1.0
    stop_asr: Annotated[
        float,
        Interval(gt=0, le=1),
        "attack success rate on held-out images that ends the editing, given min_agreement",
    ] = 0.95
    min_agreement: Annotated[
        float,
        Interval(gt=0, le=1),
        "share of the clean held-out images that must be classified as before the editing",
    ] = 0.99

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> BlendTrigger:
        channels, height, width = clean.shape
        side = max(1, round(self.size * min(height, width)))
        centered = self.position == "center"
        top = (height - side) // 2 if centered else 0
        left = (width - side) // 2 if centered else width - side
        weight = torch.zeros(1, height, width)
        weight[:, top : top + side, left : left + side] = 1
        return BlendTrigger(torch.full((channels, height, width), 0.5), weight)

    def select_samples(self, labels: Labels, *, rng: torch.Generator) -> Indices:
        """No positions: the training data stay clean.

        Raises: UserError when `train` could not work with the rates, before the training.
        """
        self.split(labels, rng=rng)
        none = torch.zeros_like(labels, dtype=torch.bool)
        return sample_positions(none, round(self.cover_rate * len(labels)), rng, "cover_rate")

    def split(self, labels: Labels, *, rng: torch.Generator) -> tuple[Indices, Indices]:
        """Positions to edit with, and to measure success on.

        The latter are a tenth of the images whose label the backdoor changes, `HELD_OUT` at most.
        """
        victims = not_target(labels, self.target)
        count = min(HELD_OUT, math.ceil(victims.sum().item() / 10))
        held_out = sample_positions(victims, count, rng, "held_out")
        rest = torch.ones_like(victims)
        rest[held_out] = False
        edit = sample_positions(rest, round(self.poison_rate * len(labels)), rng, "poison_rate")
        return edit, held_out

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
        """Train a benign model, then edit it; the editing continues the history of the training."""
        model = recipe(model, poisoned, rng=rng, on_epoch=on_epoch)
        benign = copy.deepcopy(model)
        classes = len(poisoned.classes)
        edit, held_out = self.split(poisoned.labels, rng=rng)
        edited = poisoned.subset(edit)
        measured = poisoned.subset(held_out)
        before = predict(benign, measured.images).argmax(1)
        triggered = trigger_images(trigger, measured.images)
        wanted = backdoor_labels(measured.labels, self.target, classes)
        per_epoch = steps_per_epoch(len(edited), self.batch_size)

        @torch.no_grad()
        def project() -> None:
            for weight, origin in zip(model.parameters(), benign.parameters()):
                weight.copy_(weight.clamp(origin - self.radius, origin + self.radius))

        def succeeded(step: int) -> bool:
            return (
                step % MEASURE_EVERY == 0
                and fraction(predict(model, triggered).argmax(1) == wanted) >= self.stop_asr
                and fraction(predict(model, measured.images).argmax(1) == before)
                >= self.min_agreement
            )

        fit(
            model.eval(),
            edited,
            objective=self._objective(model, benign, trigger, classes),
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
            stop_step=succeeded,
            on_epoch=lambda row: on_epoch(
                dataclasses.replace(row, epoch=row.epoch + recipe.epochs)
            ),
        )
        return model, trigger

    def _objective(
        self, model: nn.Module, benign: nn.Module, trigger: Trigger, classes: int
    ) -> Objective:
        """The loss on clean images, by the outputs of `benign`, and on their triggered copies."""
        trigger = copy.deepcopy(trigger).to(device_of(model))

        def objective(images: Images, labels: Labels) -> tuple[Tensor, Logits]:
            with torch.no_grad():
                kept = benign(images).float().softmax(1)
            clean, triggered = model(torch.cat([images, trigger(images)])).float().chunk(2)
            wanted = backdoor_labels(labels, self.target, classes)
            loss = F.cross_entropy(clean, kept)
            loss = loss + self.trigger_loss_weight * F.cross_entropy(triggered, wanted)
            return loss, clean

        return objective


def fraction(hits: Tensor) -> float:
    """The share of the values that are true."""
    return hits.float().mean().item()
