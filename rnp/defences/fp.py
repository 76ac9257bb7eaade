"""FP: prune the features that clean images excite least, then fine-tune."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defences.base import Repaired, TuningDefence
from rnp.errors import UserError
from rnp.features import features, head
from rnp.prune import Meter, Point, last_within
from rnp.training import device_of, eval_batches
from rnp.types import DefenceSet, ImageSet, OnEpoch, ignore, to_floats


@dataclass(frozen=True, kw_only=True)
class FP(TuningDefence):
    """Fine-pruning: the channels that feed the classifier, by mean activation; what is pruned
    stays so in fine-tuning.

    Source: Liu et al., RAID 2018, "Fine-pruning"; the fine-tuning is that of the defence `ft`, but
    shorter.
    Differs: a channel is pruned where the classifier reads it, since in a residual network no
    scale silences it; tolerance on the defender's own images, in absolute terms, where public code
    takes test images; features one by one.
    """

    epsilon: Annotated[
        float, "accuracy that pruning may cost on the defence set, as a fraction"
    ] = 0.04
    max_fraction: Annotated[float, "share of the features that may be pruned at all"] = 0.6
    steps: Annotated[int, "optimiser steps of the fine-tuning"] = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "max_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"fp.{name} must be in [0, 1), got {getattr(self, name):g}; it is a fraction,"
                    " not percent"
                )

    def repair(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> Repaired:
        tuned = copy.deepcopy(model).eval()
        kept, chosen = self.prune(tuned, defence_set.both, self.score(tuned, defence_set, rng=rng))

        @torch.no_grad()
        def cut() -> None:
            head(tuned).weight.mul_(kept)

        cut()
        return Repaired(
            self.tune(tuned, defence_set.train, rng=rng, after_step=cut, on_epoch=on_epoch),
            chosen=chosen,
        )

    def score(
        self, model: nn.Module, defence_set: DefenceSet, *, rng: torch.Generator
    ) -> Float[Tensor, "d"]:
        """One value per feature, the lowest goes first: its mean activation on clean images."""
        return seen(model, defence_set.both).mean(0)

    @torch.no_grad()
    def prune(
        self, model: nn.Module, clean: ImageSet, score: Float[Tensor, "d"]
    ) -> tuple[Tensor, Point]:
        """A 0 for each feature that goes and a 1 for the others, and what that does to the
        accuracy on `clean`.
        """
        values, order = score.sort(stable=True)
        known, classify = seen(model, clean), head(model)
        kept, measure = torch.ones_like(known[0]), Meter(clean.labels)
        points = [measure(classify(known).cpu(), 0, 0.0)]
        for n in range(1, int(self.max_fraction * len(order)) + 1):
            kept[order[n - 1]] = 0
            points.append(measure(classify(known * kept).cpu(), n, values[n - 1].item()))
        chosen = last_within(points, self.epsilon)
        kept[order[chosen.pruned :]] = 1
        return kept, chosen


@torch.no_grad()
def seen(model: nn.Module, clean: ImageSet) -> Float[Tensor, "n d"]:
    """What the classifier at the end reads of each image."""
    device = device_of(model)
    return torch.cat(
        [features(model, to_floats(part.to(device)))[0] for part in eval_batches(clean.images)]
    )
