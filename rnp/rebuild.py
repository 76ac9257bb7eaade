"""Rebuild: distill the given model into the pruned one, without the pruned neurons."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from rnp.detection.base import RecoveredTrigger, blend
from rnp.neurons.masks import Neuron, zero_channel
from rnp.params.ranges import Hyperparameters
from rnp.prune import Prune
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision
from rnp.training.distort import distort
from rnp.training.loop import fit, half_cosine, steps_per_epoch
from rnp.types import Images, ImageSet, OnEpoch, no_callback

REBUILDABLE = Prune(rule="accuracy_drop", max_accuracy_drop=0.02)
"""Pruning for models that are rebuilt afterwards: no neuron is skipped because it is needed."""


@dataclass(frozen=True, kw_only=True)
class Rebuild(Hyperparameters):
    """Distill the given model into the pruned one on clean images; all weights are trained.

    The neurons at the top of the ranking serve the trigger and clean images alike, so pruning them
    costs accuracy. The other neurons learn to replace them, from the outputs of the given model for
    images without a trigger. Pruned neurons stay pruned. Some of the images are distorted and some
    carry a recovered trigger, while the given model sees them as they were: the rebuilt model
    learns to ignore what was added, and so little of the backdoor returns. The network is in eval
    mode: BatchNorm keeps its statistics, and nothing is dropped out.

    Source: Hinton et al., 2015, arXiv 1503.02531, section 2, for the loss, the Kullback-Leibler
    divergence at a temperature, times its square. The rest is ours.
    """

    lr: Annotated[float, Gt(0), "learning rate at the start; it falls on half a cosine"] = 0.005
    momentum: Annotated[float, "SGD momentum"] = 0.9
    batch_size: Annotated[int, Gt(0), "images per step"] = 128
    steps: Annotated[int, Ge(0), "optimizer steps; 0 leaves the pruned model as it is"] = 120
    temperature: Annotated[float, Gt(0), "temperature of the distillation"] = 2.0
    max_grad_norm: Annotated[float, Gt(0), "largest norm of a gradient"] = 2.0
    distort_fraction: Annotated[
        float, Interval(ge=0, le=1), "fraction of the images that are distorted"
    ] = 0.5
    trigger_fraction: Annotated[
        float,
        Interval(ge=0, le=1),
        "fraction of the images that carry a recovered trigger, or half of it for one not local",
    ] = 0.4
    augment: Augment = Augment()

    def __call__(
        self,
        given: nn.Module,
        pruned: nn.Module,
        neurons: Iterable[Neuron],
        clean: ImageSet,
        *,
        rng: torch.Generator,
        triggers: Sequence[RecoveredTrigger] = (),
        on_epoch: OnEpoch = no_callback,
    ) -> nn.Module:
        """A rebuilt copy of `pruned`, in eval mode, in which `neurons` are pruned.

        Drawn at random: the order and the augmentation of the images, which of them are distorted
        and how, and which carry which of `triggers`.
        """
        teacher = copy.deepcopy(given).eval().requires_grad_(False)
        student = copy.deepcopy(pruned).eval().requires_grad_(True)
        if not self.steps:
            return student
        kept_out = list(neurons)
        per_epoch = steps_per_epoch(len(clean), self.batch_size)

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                targets = teacher(images).float()
            logits = student(self.add_changes(images, triggers, rng))
            return self.divergence(logits.float(), targets), logits

        @torch.no_grad()
        def keep_pruned() -> None:
            for neuron in kept_out:
                zero_channel(student, neuron)

        fit(
            student,
            clean,
            objective=objective,
            rng=rng,
            epochs=self.steps,
            max_steps=self.steps,
            optimizer=torch.optim.SGD(student.parameters(), lr=self.lr, momentum=self.momentum),
            batch_size=self.batch_size,
            augment=self.augment,
            schedule=half_cosine(self.steps, per_epoch),
            max_grad_norm=self.max_grad_norm,
            precision=chosen_precision(),
            after_step=keep_pruned,
            on_epoch=on_epoch,
        )
        return student

    def divergence(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Kullback-Leibler divergence from the teacher's logits `targets`, at the temperature."""
        log_probabilities = (logits / self.temperature).log_softmax(1)
        wanted = (targets / self.temperature).softmax(1)
        return self.temperature**2 * F.kl_div(log_probabilities, wanted, reduction="batchmean")

    def add_changes(
        self, images: Images, triggers: Sequence[RecoveredTrigger], rng: torch.Generator
    ) -> Images:
        """Distort some of `images`, and put a trigger on some.

        A trigger that is not local is put on half as many.
        """
        device = images.device
        distort_draw, trigger_draw = torch.rand(2, len(images), 1, 1, 1, generator=rng).to(device)
        if self.distort_fraction:
            distorted = distort(images, rng=rng)
            images = torch.where(distort_draw < self.distort_fraction, distorted, images)
        if triggers:
            index = torch.randint(len(triggers), (len(images),), generator=rng).to(device)
            masks = torch.stack([trigger.mask for trigger in triggers]).to(device)[index]
            patterns = torch.stack([trigger.pattern for trigger in triggers]).to(device)[index]
            # A pattern all over the image costs more clean accuracy, and is unlearned sooner.
            share = torch.tensor([1.0 if trigger.is_local else 0.5 for trigger in triggers])
            fraction = self.trigger_fraction * share.to(device)[index].view(-1, 1, 1, 1)
            carries = trigger_draw < fraction
            images = blend(images, carries * masks.unsqueeze(1), patterns)
        return images
