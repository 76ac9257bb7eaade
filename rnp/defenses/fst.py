"""FST: fine-tuning with a new classifier that is pushed away from the old one, so that the
features must shift.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from torch import Tensor, nn

from rnp.defenses.base import Repaired, TuningDefense
from rnp.models.features import head
from rnp.types import DefenseSet, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class FST(TuningDefense):
    """Feature shift tuning: cross-entropy + alpha * <w, w_old>, with the norm of w kept.

    `w` are the weights of the classifier at the end, `w_old` those of the given model.

    Drawn at random: the new classifier, the order of the images and their augmentation.

    Source: Min et al., NeurIPS 2023, section 4.
    Differs: length in steps, so that a smaller defense set gets as many; half a cosine; smaller
    batches.
    """

    alpha: Annotated[
        float, Ge(0), "weight of the inner product of new and old classifier weights"
    ] = 0.2
    steps: Annotated[int, Gt(0), "optimizer steps of the fine-tuning"] = 400

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        tuned = copy.deepcopy(model)
        classifier = head(tuned)
        old = classifier.weight.detach().clone()  # [k, d]

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = tuned(images)
            loss = F.cross_entropy(logits.float(), labels)
            return loss + self.alpha * (classifier.weight * old).sum(), logits

        @torch.no_grad()
        def restore_norm() -> None:
            classifier.weight.mul_(old.norm() / classifier.weight.norm())

        reinitialize(classifier, rng=rng)
        restore_norm()
        self.tune(
            tuned,
            defense_set.train,
            rng=rng,
            objective=objective,
            after_step=restore_norm,
            on_epoch=on_epoch,
        )
        return Repaired(tuned)


@torch.no_grad()
def reinitialize(layer: nn.Linear, *, rng: torch.Generator) -> None:
    """Draw the weights anew, by PyTorch's own initialization."""
    bound = layer.in_features**-0.5
    for value in layer.parameters():
        value.copy_(torch.empty(value.shape).uniform_(-bound, bound, generator=rng))
