"""The label to which images of all other classes turn when the neurons of the model are
disturbed.
"""

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
    """The score of a class is its share of the predictions for images of the *other* classes,
    averaged over noisy copies.

    A benign model turns to some class too, and strong noise turns a backdoored one to any: the
    verdict is a hint.
    Drawn at random: the noise, and the images of the ascent.

    Source: Wu and Wang, NeurIPS 2021 (ANP), section 3, with its strength of .4 and its single step.
    Differs: several copies from random starts, since one copy turns all images to a single class
    and says nothing on the second; predictions are counted per class as `prediction_drift` counts
    them.
    """

    min_score: Annotated[
        float, Interval(ge=0, le=1), "highest share, in [0, 1], below which no label is named"
    ] = 0.5
    min_margin: Annotated[
        float, Interval(ge=0, le=1), "lead over the second class below which no label is named"
    ] = 0.2
    strength: Annotated[
        float, Gt(0), "largest change of a channel's scale and bias, as a share of them"
    ] = 0.4
    copies: Annotated[int, Gt(0), "noisy copies of the model"] = 10
    steps: Annotated[
        int, Ge(0), "ascent steps on the loss of clean images; 0 leaves the noise uniform"
    ] = 1
    batch_size: Annotated[int, Gt(0), "images per step"] = 128

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """Raises: UserError when the model has no neurons to disturb."""
        shares = torch.zeros(len(clean.classes))
        for _ in range(self.copies):
            predicted = predict(
                self._disturbed(model, clean, rng), clean.images, precision=chosen_precision()
            ).argmax(1)
            shares += class_shares(predicted, clean.labels, len(clean.classes))
        return shares / self.copies

    def _disturbed(self, model: nn.Module, clean: ImageSet, rng: torch.Generator) -> nn.Module:
        """A copy whose BatchNorm scales and biases are changed by at most `strength` times
        themselves.
        """
        device = device_of(model)
        disturbed = copy.deepcopy(model).eval().requires_grad_(False)
        free = [
            p
            for layer in maskable(disturbed).values()
            for p in (layer.weight, bias(layer))
            if p is not None
        ]
        centers, reaches = [p.clone() for p in free], [self.strength * p.abs() for p in free]
        for p, reach in zip(free, reaches):
            p += reach * (2 * torch.rand(p.shape, generator=rng) - 1).to(device)
            p.requires_grad_()
        for _ in range(self.steps):
            drawn = torch.randint(len(clean), (self.batch_size,), generator=rng)
            images = to_floats(clean.images[drawn].to(device))
            with autocast(chosen_precision(), device):
                loss = F.cross_entropy(disturbed(images).float(), clean.labels[drawn].to(device))
            with torch.no_grad():
                for p, g, center, reach in zip(
                    free, torch.autograd.grad(loss, free), centers, reaches
                ):
                    p.copy_(
                        (p + g.sign() * reach / self.steps).clamp(center - reach, center + reach)
                    )
        return disturbed
