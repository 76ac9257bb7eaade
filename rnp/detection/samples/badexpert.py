"""BaDExpert: a copy tuned on wrong labels forgets clean images, but not the backdoor."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector
from rnp.detection.samples.unlearned_ratio import log_ratio
from rnp.neurons.masks import freeze_statistics
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision
from rnp.training.loop import cross_entropy, fit
from rnp.training.predict import accuracy
from rnp.types import Bytes, ImageSet


@dataclass(frozen=True, kw_only=True)
class BaDExpert(SampleDetector):
    """Log ratio of the expert's confidence in the model's prediction to the model's own.

    In nats. The expert is a copy of the model that is tuned on wrong labels in each call, the same
    one for the same `rng`.

    Drawn at random: the wrong labels, the order and the augmentation of the images.

    Source: Xie et al., ICLR 2024, arXiv 2308.12439: the expert and the ratio of the two
    confidences.
    Differs: tuning ends at an accuracy, not after one pass, since 500 images make few steps;
    BatchNorm keeps its running statistics, which causes fewer false alarms in the target class;
    no second copy is tuned on the right labels.
    """

    lr: Annotated[float, Gt(0), "learning rate of Adam"] = 1e-4
    batch_size: Annotated[int, Gt(0), "images per step"] = 64
    epochs: Annotated[int, Gt(0), "passes over the clean images, at most"] = 20
    stop_accuracy: Annotated[
        float, Interval(gt=0, lt=1), "accuracy on the clean images at which the tuning ends"
    ] = 0.2
    augment: Augment = Augment()

    def score(
        self,
        model: nn.Module,
        images: Bytes,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        unlearned: nn.Module | None = None,
    ) -> Float[Tensor, "n"]:
        return log_ratio(self._tune_expert(model, clean, rng), model, images)

    def _tune_expert(self, model: nn.Module, clean: ImageSet, rng: torch.Generator) -> nn.Module:
        k = len(clean.classes)
        wrong = (clean.labels + torch.randint(1, k, clean.labels.shape, generator=rng)) % k
        expert = freeze_statistics(copy.deepcopy(model), frozen=True)
        fit(
            expert,
            ImageSet(clean.images, wrong, clean.classes),
            objective=cross_entropy(expert),
            optimizer=torch.optim.Adam(expert.parameters(), lr=self.lr),
            epochs=self.epochs,
            batch_size=self.batch_size,
            rng=rng,
            augment=self.augment,
            precision=chosen_precision(),
            stop_epoch=lambda _: (
                accuracy(expert, clean, precision=chosen_precision()) <= self.stop_accuracy
            ),
        )
        return expert
