"""The loss of each training image early in a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rnp.training.recipe import Train
from rnp.types import ImageSet, Indices, Labels, Logits, OnEpoch, no_callback


class EarlyLossRecorder:
    """Hears of the steps of a training run: the mean cross-entropy of each image over its first
    epochs, in nats.

    Source: Li et al., NeurIPS 2021 (ABL), section 3.2: poisoned images are learned first; a fifth
    of the run, as there.
    Differs: the mean of the losses that training computes anyway, where ABL adds a pass at the end
    of that part, and holds the loss near a value of its own meanwhile.
    """

    def __init__(self, images: int, epochs: int, device: torch.device) -> None:
        self.epochs = max(1, round(0.2 * epochs))
        self.total, self.times = (
            torch.zeros(images, device=device),
            torch.zeros(images, device=device),
        )

    def __call__(self, positions: Indices, labels: Labels, logits: Logits) -> None:
        here = positions.to(logits.device)
        fresh = self.times[here] < self.epochs
        self.total[here] += fresh * F.cross_entropy(logits.float(), labels, reduction="none")
        self.times[here] += fresh.float()

    def mean(self) -> Float[Tensor, "n"]:
        """NaN for images that were never seen; on the CPU."""
        return (self.total / self.times).cpu()


@dataclass(frozen=True, kw_only=True)
class TrainWithLosses(Train):
    """A recipe of which `losses` hears."""

    losses: EarlyLossRecorder

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> nn.Module:
        return super().__call__(model, data, rng=rng, on_epoch=on_epoch, on_batch=self.losses)
