"""MM-BD: the label whose margin over the others can be optimized to an abnormal height."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import LabelDetector
from rnp.errors import UserError
from rnp.training.device import autocast, chosen_precision, device_of
from rnp.types import ImageSet, Logits


@dataclass(frozen=True, kw_only=True)
class MMBD(LabelDetector):
    """-log10 of the probability of a class's maximum margin, given those of the other classes.

    It uses no clean image. Drawn at random: the images from which the ascent starts.

    Source: Wang et al., S&P 2024, arXiv 2205.06900, section 4, with its significance of .05.
    Differs: Adam on clipped pixels takes 30 steps where plain gradient ascent takes up to 3,000;
    the gamma distribution is fitted by moments, not by likelihood; every class gets a score, not
    only the one with the largest margin.
    """

    min_classes: ClassVar[int] = 3

    min_score: Annotated[
        float, Ge(0), "highest -log10 probability below which no label is predicted"
    ] = 1.3
    min_margin: Annotated[
        float, Ge(0), "lead over the second class below which no label is predicted"
    ] = 0.0
    starts: Annotated[int, Gt(0), "random images per class"] = 10
    steps: Annotated[int, Gt(0), "optimization steps"] = 30
    lr: Annotated[float, Gt(0), "learning rate of Adam, for pixels in [0, 1]"] = 0.1

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """One score per class.

        Raises: UserError for fewer than three classes.
        """
        if len(clean.classes) < self.min_classes:
            raise UserError(
                f"mm_bd compares each class with two others, got {len(clean.classes)} classes; use"
                " prediction_drift"
            )
        return surprise(self.maximum_margins(model, clean, rng=rng))

    def maximum_margins(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """For each class the largest margin of its logit over all ascents."""
        device = device_of(model)
        network = copy.deepcopy(model).eval().requires_grad_(False)
        largest = []
        for label in range(len(clean.classes)):
            noise = torch.rand(self.starts, *clean.shape, generator=rng)
            images = noise.to(device).requires_grad_()
            optimizer = torch.optim.Adam([images], lr=self.lr, maximize=True)
            for _ in range(self.steps):
                with autocast(chosen_precision(), device):
                    logits = network(images).float()
                optimizer.zero_grad()
                margins(logits, label).sum().backward()
                optimizer.step()
                images.data.clamp_(0, 1)
            largest.append(margins(network(images.detach()), label).max().cpu())
        return torch.stack(largest)


def margins(logits: Logits, label: int) -> Float[Tensor, "n"]:
    """Lead of the label's logit over the highest of the others."""
    is_label = torch.arange(logits.shape[1], device=logits.device) == label
    return logits[:, label] - logits.masked_fill(is_label, -math.inf).amax(1)


def surprise(largest: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """-log10 of the probability that a maximum margin at least as large occurs by chance.

    By chance means: as the largest of k margins with the distribution of the *other* classes.
    """
    k = len(largest)
    values = largest.double().clamp_min(0)  # a gamma distribution has no negative values
    others = values.expand(k, k)[~torch.eye(k, dtype=torch.bool)].view(k, k - 1)
    mean = others.mean(1).clamp_min(1e-6)
    variance = others.var(1).clamp_min(1e-6 * mean.square())
    one_exceeds = torch.special.gammaincc(mean.square() / variance, values * mean / variance)
    any_exceeds = -torch.expm1(k * torch.log1p(-one_exceeds))
    return -any_exceeds.clamp_min(1e-16).log10().float()
