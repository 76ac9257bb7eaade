"""The loss of each training image in the first epochs of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rnp.training.loop import OnBatch, no_batch_callback
from rnp.training.recipe import Train
from rnp.types import ImageSet, Indices, Labels, Logits, OnEpoch, no_callback


class EarlyLossRecorder:
    """An `on_batch` callback: the mean cross-entropy, in nats, of each image in the first epochs.

    Source: Li et al., NeurIPS 2021 (ABL), section 3.2: poisoned images are learned first; the
    first fifth of the run, as there.
    Differs: averages the losses that training computes anyway, where ABL adds a pass at the end
    of that fifth; does not hold the loss near a value meanwhile, as ABL does.
    """

    def __init__(self, images: int, epochs: int, device: torch.device) -> None:
        self.epochs = max(1, round(0.2 * epochs))
        self.total = torch.zeros(images, device=device)
        self.times = torch.zeros(images, device=device)

    def __call__(self, positions: Indices, labels: Labels, logits: Logits) -> None:
        positions = positions.to(logits.device)
        early = self.times[positions] < self.epochs
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        self.total[positions] += early * losses
        self.times[positions] += early.float()

    def mean(self) -> Float[Tensor, "n"]:
        """On the CPU; NaN for images that were never seen."""
        return (self.total / self.times).cpu()


@dataclass(frozen=True, kw_only=True)
class TrainWithLosses(Train):
    """`Train` that also records per-sample losses."""

    losses: EarlyLossRecorder

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
        on_batch: OnBatch = no_batch_callback,
    ) -> nn.Module:
        def record(positions: Indices, labels: Labels, logits: Logits) -> None:
            self.losses(positions, labels, logits)
            on_batch(positions, labels, logits)

        return super().__call__(model, data, rng=rng, on_epoch=on_epoch, on_batch=record)
