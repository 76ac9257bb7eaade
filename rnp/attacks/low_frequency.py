"""LF: a smooth pattern of a few low frequencies is added to the whole image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.attacks.base import AdditiveTrigger, Attack, require_surrogate
from rnp.errors import UserError
from rnp.training.device import device_of
from rnp.types import ImageSet, to_floats


@dataclass(frozen=True, kw_only=True)
class LowFrequency(Attack):
    """The pattern is a universal perturbation of the surrogate that leads to the target.

    Drawn at random: where the search starts, its batches, and which images are poisoned.
    Expected: CA .932 and ASR .993 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 10 %).
    Source: Zeng et al., ICCV 2021, arXiv 2104.03413, smooth triggers.
    Differs: a cosine basis holds low frequencies alone, where the paper filters what it optimizes;
    few steps on few images.
    """

    threat_model = (
        "the poisoned share of the training data with their labels, and a benign model to find the"
        " pattern on"
    )

    amplitude: Annotated[
        float, Interval(gt=0, le=1), "largest change of a pixel, as a fraction of full scale"
    ] = 40 / 255
    num_frequencies: Annotated[int, Ge(2), "cosines along each axis, of 0, 1/2, 1, ... periods"] = 4
    steps: Annotated[int, Ge(0), "steps of Adam on the surrogate; 0 keeps the random start"] = 60
    batch_size: Annotated[int, Gt(0), "images per step"] = 100
    lr: Annotated[float, Gt(0), "learning rate of the steps"] = 0.1

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> AdditiveTrigger:
        model = require_surrogate(surrogate, self.name)
        side = min(clean.shape[1:])
        if self.num_frequencies > side:
            raise UserError(
                f"num_frequencies must be at most {side}, the shorter side of the images,"
                f" got {self.num_frequencies}"
            )
        device = device_of(model)
        basis = cosines(clean.shape, self.num_frequencies).to(device)  # [f, h, w]
        weights = torch.randn(clean.shape[0], len(basis), generator=rng).to(device)
        weights.requires_grad_()
        optimizer = torch.optim.Adam([weights], lr=self.lr)
        for _ in range(self.steps):
            batch = torch.randint(len(clean), (self.batch_size,), generator=rng)
            images = to_floats(clean.images[batch].to(device))
            labels = clean.labels[batch].to(device)
            logits = model((images + self.pattern(weights, basis)).clamp(0, 1))
            loss = F.cross_entropy(logits, self.poison_labels(labels, len(clean.classes)))
            (weights.grad,) = torch.autograd.grad(loss, [weights])
            optimizer.step()
        return AdditiveTrigger(self.pattern(weights, basis).detach().cpu())

    def pattern(
        self, weights: Float[Tensor, "c f"], basis: Float[Tensor, "f h w"]
    ) -> Float[Tensor, "c h w"]:
        """The weighted sum of the basis; its largest absolute value is `amplitude`."""
        smooth = (weights @ basis.flatten(1)).unflatten(1, basis.shape[1:])
        return self.amplitude * smooth / smooth.abs().amax()


def cosines(shape: tuple[int, int, int], count: int) -> Float[Tensor, "f h w"]:
    """The `count` x `count` lowest cosines of the image size, without the constant one."""
    _, height, width = shape
    y = axis_cosines(height, count)
    x = axis_cosines(width, count)
    return (y[:, None, :, None] * x[None, :, None, :]).flatten(0, 1)[1:]


def axis_cosines(side: int, count: int) -> Float[Tensor, "count side"]:
    """The cosines of 0, 1/2, 1, ... periods along one axis."""
    order = torch.arange(count).unsqueeze(1)
    return (math.pi * (torch.arange(side) + 0.5) / side * order).cos()
