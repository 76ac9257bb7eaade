"""The label that images of other classes are assigned to when neurons are perturbed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import LabelDetector
from rnp.neurons.masks import bias, maskable
from rnp.training.device import autocast, chosen_precision, device_of
from rnp.training.predict import class_shares, predict
from rnp.types import ImageSet, to_floats


@dataclass(frozen=True, kw_only=True)
class NeuronNoise(LabelDetector):
    """A class's share of the predictions for images of *other* classes, averaged over noisy copies.

    The verdict is a hint: a benign model drifts to some class too, and with strong noise a
    backdoored one may drift to any class.

    Drawn at random: the noise, and the images of the ascent.

    Source: Wu and Wang, NeurIPS 2021 (ANP), section 3, with its strength of 0.4 and its single
    step.
    Differs: several copies from random starts, since a single copy assigns all images to one
    class and gives no score for the second; predictions are counted per class as by
    `prediction_drift`.
    """

    min_score: Annotated[
        float, Interval(ge=0, le=1), "highest share below which no label is predicted"
    ] = 0.5
    min_margin: Annotated[
        float, Interval(ge=0, le=1), "lead over the second class below which no label is predicted"
    ] = 0.2
    strength: Annotated[
        float, Gt(0), "largest change of a channel's scale and bias, relative to them"
    ] = 0.4
    copies: Annotated[int, Gt(0), "noisy copies of the model"] = 10
    steps: Annotated[
        int, Ge(0), "ascent steps on the loss of clean images; 0 leaves the noise uniform"
    ] = 1
    batch_size: Annotated[int, Gt(0), "images per step"] = 128

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """One share per class.

        Raises: UserError when the model has no neurons to perturb.
        """
        shares = torch.zeros(len(clean.classes))
        for _ in range(self.copies):
            perturbed = self._perturb(model, clean, rng)
            logits = predict(perturbed, clean.images, precision=chosen_precision())
            shares += class_shares(logits.argmax(1), clean.labels, len(clean.classes))
        return shares / self.copies

    def _perturb(self, model: nn.Module, clean: ImageSet, rng: torch.Generator) -> nn.Module:
        """A copy whose BatchNorm scales and biases are changed by at most `strength`, relatively.

        They start from uniform noise, and the ascent moves them in the direction of a higher loss.
        """
        device = device_of(model)
        perturbed = copy.deepcopy(model).eval().requires_grad_(False)
        free = self._free_parameters(perturbed)
        centers = [p.clone() for p in free]
        radii = [self.strength * p.abs() for p in free]
        for p, radius in zip(free, radii):
            p += radius * (2 * torch.rand(p.shape, generator=rng) - 1).to(device)
            p.requires_grad_()
        for _ in range(self.steps):
            positions = torch.randint(len(clean), (self.batch_size,), generator=rng)
            images = to_floats(clean.images[positions].to(device))
            labels = clean.labels[positions].to(device)
            with autocast(chosen_precision(), device):
                loss = F.cross_entropy(perturbed(images).float(), labels)
            gradients = torch.autograd.grad(loss, free)
            with torch.no_grad():
                for p, g, center, radius in zip(free, gradients, centers, radii):
                    step = g.sign() * radius / self.steps
                    p.copy_((p + step).clamp(center - radius, center + radius))
        return perturbed

    @staticmethod
    def _free_parameters(model: nn.Module) -> list[Tensor]:
        parts = [part for layer in maskable(model).values() for part in (layer.weight, bias(layer))]
        return [part for part in parts if isinstance(part, Tensor)]
