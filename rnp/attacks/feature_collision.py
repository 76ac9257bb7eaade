"""Feature collision (experimental): target-class images get the features of triggered ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from torch import nn

from rnp.attacks.base import (
    Attack,
    BlendTrigger,
    PoisonRate,
    checkerboard,
    not_target,
    require_surrogate,
    trigger_images,
)
from rnp.models.features import features
from rnp.training.device import device_of
from rnp.types import Images, ImageSet, PoisonedSet, to_bytes, to_floats

BATCH = 250


@dataclass(frozen=True, kw_only=True)
class FeatureCollision(Attack):
    """No poisoned image shows the trigger, a checkerboard, or changes its label.

    The original is made for fine-tuning the last layer of a network that the attacker knows. A
    victim that trains from scratch learns features of its own, and then the backdoor mostly fails
    its gate: leave it out of averages where it does.

    Drawn at random: which images are poisoned, and for each the image of another class whose
    features, with the trigger on, it takes on.
    Expected: unstable where victims train from scratch; no comparable published number.
    Source: Saha et al., AAAI 2020, arXiv 1910.00033 (hidden triggers), after Shafahi et al.,
    NeurIPS 2018, arXiv 1804.00792.
    Differs: Shafahi et al. attack one test image and have no trigger; pairs are drawn once, not
    matched anew at each step; Adam for 30 steps, which bring features within about an eighth of
    their first distance, instead of up to 5,000: on CIFAR-10 that is minutes on a few cores
    instead of hours.
    """

    min_asr = 0.8
    threat_model = (
        "the poisoned share of the training images, not their labels, and a benign model to find"
        " features with"
    )
    clean_label = True

    poison_rate: PoisonRate = 0.05
    size: Annotated[int, "side of the patch, in pixels"] = 5
    epsilon: Annotated[
        float, Interval(gt=0, le=1), "largest change of a pixel, as a fraction of full scale"
    ] = 16 / 255
    steps: Annotated[int, Gt(0), "steps towards the features of the triggered image"] = 30
    lr: Annotated[float, Gt(0), "Adam step on the pixels, as a fraction of full scale"] = 0.01

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> BlendTrigger:
        return checkerboard(clean.shape, self.size)

    def poison(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> PoisonedSet:
        model = require_surrogate(surrogate, self.name)
        poisoned = super().poison(clean, rng=rng)
        rows = (~poisoned.covers).nonzero().squeeze(1)
        candidates = not_target(clean.labels, self.target).nonzero().squeeze(1)
        sources = candidates[torch.randint(len(candidates), rows.shape, generator=rng)]
        for part, source in zip(rows.split(BATCH), sources.split(BATCH)):
            bases = to_floats(clean.images[poisoned.positions[part]])
            triggered = to_floats(trigger_images(poisoned.trigger, clean.images[source]))
            poisoned.images[part] = to_bytes(self.collide(model, bases, triggered))
        return poisoned

    def collide(self, model: nn.Module, bases: Images, sources: Images) -> Images:
        """`bases`, changed by up to `epsilon` so that features approach those of `sources`."""
        device = device_of(model)
        bases = bases.to(device)
        with torch.no_grad():
            wanted, _ = features(model, sources.to(device))
        low = (bases - self.epsilon).clamp_min(0)
        high = (bases + self.epsilon).clamp_max(1)
        images = bases.clone().requires_grad_()
        optimizer = torch.optim.Adam([images], lr=self.lr)
        for _ in range(self.steps):
            current, _ = features(model, images)
            loss = (current - wanted).square().sum()
            # not `backward`: the weights of the model get no gradients
            (images.grad,) = torch.autograd.grad(loss, images)
            optimizer.step()
            with torch.no_grad():
                images.copy_(images.clamp(low, high))
        return images.detach().cpu()
