"""Input-aware (Dynamic): each image has its own trigger, which has no effect on other images."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.attacks.base import Attack, trainable_copy
from rnp.models.build import statistics
from rnp.models.unet import draw_unet, unet
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision, device_of
from rnp.training.loop import Objective, fit
from rnp.types import Images, ImageSet, Labels, Logits, Trigger


class InputAwareTrigger(Trigger):
    """image + mask * (pattern - image), where two U-Nets make mask and pattern from the image.

    `weights` are those of `draw_unet` with the prefixes `mask_` and `pattern_`.
    """

    def __init__(self, **weights: Tensor) -> None:
        super().__init__()
        for name, value in weights.items():
            self.register_buffer(name, value)

    def forward(self, images: Images) -> Images:
        return compose(self.pattern(images), self.mask(images), images)

    def mask(self, images: Images) -> Float[Tensor, "n 1 h w"]:
        """The weight of the pattern at each pixel, in [0, 1], mostly near 0 or 1."""
        return (10 * self._unet(images, "mask_").tanh()).sigmoid()

    def pattern(self, images: Images) -> Images:
        """The colors of the trigger, in [0, 1]."""
        return self._unet(images, "pattern_").sigmoid()

    def _unet(self, images: Images, prefix: str) -> Float[Tensor, "n outputs h w"]:
        """A U-Net that cannot tell the border of the image.

        Otherwise masks gather there, similar for many images (ASR on shapes .80).
        """
        return unet(images, dict(self.named_buffers()), prefix=prefix, border="replicate")


@dataclass(frozen=True, kw_only=True)
class InputAware(Attack):
    """A network makes the trigger of each image; covers carry the trigger of another image.

    First the mask network is trained, then the pattern network together with a copy of the
    surrogate, which is then discarded. Covers keep their true label: without them one trigger
    would work on all images.

    Drawn at random: the first weights of the networks, the order and augmentation of the images
    they learn from, and for every cover the image whose trigger it carries.
    Expected: CA .907 and ASR .983 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 10 %).
    Source: Nguyen and Tran, NeurIPS 2020, Input-aware dynamic backdoor attack, section 3.
    Differs: the victim is trained from scratch on a set poisoned once, not together with the
    pattern network; masks may cover the share `density` of an image, where public code charges
    each pixel above `density`; distances of images and of patterns are taken in deviations of the
    data. To be done in minutes on a CPU: the classifier that helps the patterns learn starts from
    a trained one; clean, triggered and cross-triggered images are a third of a batch each, not .8,
    .1 and .1; hundreds of steps of Adam, not hundreds of epochs; small U-Nets. The images that
    this classifier sees are augmented after the trigger, as the victim's will be.
    """

    threat_model = (
        "the poisoned share of the training data with their labels, and a benign model to train the"
        " generators on"
    )

    cover_rate: Annotated[
        float,
        Interval(ge=0, le=1),
        "share of the training set that carries another image's trigger under its true label",
    ] = 0.1
    density: Annotated[
        float, Interval(gt=0, lt=1), "share of the pixels that a trigger covers before `norm` acts"
    ] = 0.032
    norm: Annotated[float, Ge(0), "weight of the loss on larger masks"] = 100.0
    mask_diversity: Annotated[
        float, Ge(0), "weight of the loss that drives the masks of two images apart"
    ] = 1.0
    pattern_diversity: Annotated[
        float, Ge(0), "weight of the loss that drives the patterns of two images apart"
    ] = 0.05
    width: Annotated[int, Gt(0), "channels of the first layer of each network"] = 16
    epochs: Annotated[int, Gt(0), "passes over the training set for each network, at most"] = 5
    steps: Annotated[int, Gt(0), "optimizer steps for each network, at most"] = 500
    batch_size: Annotated[
        int, Gt(0), "images per step, each of them seen clean, triggered and cross-triggered"
    ] = 48
    lr: Annotated[float, Gt(0), "learning rate of the two networks"] = 2e-3
    surrogate_lr: Annotated[float, Gt(0), "learning rate of the copy of the surrogate"] = 1e-3

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> InputAwareTrigger:
        model = trainable_copy(surrogate, self.name)
        channels = clean.shape[0]
        draw = functools.partial(draw_unet, width=self.width, rng=rng, device=device_of(model))
        masks = draw(channels, 1, prefix="mask_")
        patterns = draw(channels, channels, prefix="pattern_")
        trigger = InputAwareTrigger(**masks, **patterns)
        deviation = statistics(clean)[1].view(-1, 1, 1).to(device_of(model))

        def diversity_loss(outputs: Tensor, images: Images) -> Tensor:
            return (distance(images / deviation) / distance(outputs)).mean()

        def mask_loss(images: Images, labels: Labels) -> tuple[Tensor, Logits]:
            mask = trigger.mask(images)
            excess = (mask.mean((1, 2, 3)) - self.density).relu().mean()
            loss = self.mask_diversity * diversity_loss(mask, images) + self.norm * excess
            return loss, images.new_zeros(len(images), 1)  # nothing is classified

        def pattern_loss(images: Images, labels: Labels) -> tuple[Tensor, Logits]:
            mask = trigger.mask(images)
            pattern = trigger.pattern(images)
            triggered = compose(pattern, mask, images)
            crossed = compose(rolled(pattern), rolled(mask), images)
            seen = Augment()(torch.cat([images, triggered, crossed]), rng=rng)
            logits = model(seen).float()
            wanted = torch.cat([labels, self.poison_labels(labels, len(clean.classes)), labels])
            diversity = diversity_loss(pattern / deviation, images)
            loss = F.cross_entropy(logits, wanted) + self.pattern_diversity * diversity
            return loss, logits[: len(images)]

        def learn(objective: Objective, *groups: dict[str, object]) -> None:
            fit(
                model,
                clean,
                objective=objective,
                optimizer=torch.optim.Adam(groups, lr=self.lr),
                epochs=self.epochs,
                max_steps=self.steps,
                batch_size=self.batch_size,
                rng=rng,
                precision=chosen_precision(),
            )

        learn(mask_loss, {"params": [*masks.values()]})
        for weight in masks.values():
            weight.requires_grad_(False)
        weights = {"params": [*model.parameters()], "lr": self.surrogate_lr}
        learn(pattern_loss, {"params": [*patterns.values()]}, weights)
        learned = {name: value.detach().cpu() for name, value in trigger.named_buffers()}
        return InputAwareTrigger(**learned)

    def apply_cover(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        assert isinstance(trigger, InputAwareTrigger)
        return cross_triggered(trigger, images, rng=rng)


def cross_triggered(trigger: InputAwareTrigger, images: Images, *, rng: torch.Generator) -> Images:
    """Each image with the trigger of another one, drawn at random; a single image stays clean.

    The backdoor does not react to these.
    """
    if len(images) == 1:
        return images
    order = torch.randperm(len(images), generator=rng)
    source = torch.empty_like(order)
    source[order] = rolled(order)  # one cycle through all images, so none is its own source
    return compose(trigger.pattern(images)[source], trigger.mask(images)[source], images)


def compose(pattern: Images, mask: Float[Tensor, "n 1 h w"], images: Images) -> Images:
    """The images with the pattern where the mask is 1."""
    return images + mask * (pattern - images)


def rolled(batch: Tensor) -> Tensor:
    """Each member replaced by the one before it; the first by the last."""
    return batch.roll(1, 0)


def distance(batch: Float[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    """Root mean square difference between each image and the one before it.

    It is never quite 0, where the root has no gradient.
    """
    return ((batch - rolled(batch)).square().mean((1, 2, 3)) + 1e-8).sqrt()
