"""FP: prune the features that clean images excite least, then fine-tune."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from rnp.defences.base import Repaired, TuningDefence
from rnp.errors import UserError
from rnp.features import features, head
from rnp.prune import Meter, Point, last_within
from rnp.training import EVAL_BATCH, device_of
from rnp.types import DefenceSet, ImageSet, OnEpoch, ignore, to_floats


@dataclass(frozen=True, kw_only=True)
class FP(TuningDefence):
    """Fine-pruning: the channels that feed the classifier, by mean activation; what is pruned stays so in fine-tuning.

    Source: Liu et al., RAID 2018, "Fine-pruning"; the fine-tuning is that of the defence `ft`, but shorter.
    Differs: a channel is pruned where the classifier reads it, since in a residual network no scale silences it; tolerance
    on the defender's own images, in absolute terms, where public code takes test images; features one by one.
    """

    epsilon: Annotated[float, "accuracy that pruning may cost on the defence set, as a fraction"] = 0.04
    max_fraction: Annotated[float, "share of the features that may be pruned at all"] = 0.6
    steps: Annotated[int, "optimiser steps of the fine-tuning"] = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epsilon", "max_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"fp.{name} must be in [0, 1), got {getattr(self, name):g}; it is a fraction, not percent")

    def repair(self, model: nn.Module, defence_set: DefenceSet, *, rng: torch.Generator, on_epoch: OnEpoch = ignore) -> Repaired:
        tuned = copy.deepcopy(model)
        kept, chosen = self.prune(tuned.eval(), defence_set.both)

        @torch.no_grad()
        def cut() -> None:
            head(tuned).weight.mul_(kept)

        cut()
        return Repaired(self.tune(tuned, defence_set.train, rng=rng, after_step=cut, on_epoch=on_epoch), chosen=chosen)

    @torch.no_grad()
    def prune(self, model: nn.Module, clean: ImageSet) -> tuple[Tensor, Point]:
        """A 0 for each feature that goes and a 1 for the others, and what that does to the accuracy on `clean`."""
        device, classify = device_of(model), head(model)
        parts = (to_floats(part.to(device)) for part in clean.images.split(EVAL_BATCH))
        seen = torch.cat([features(model, part)[0] for part in parts])  # [n, d]
        activation, order = seen.mean(0).sort(stable=True)
        kept, measure = torch.ones_like(activation), Meter(clean.labels)
        points = [measure(classify(seen).cpu(), 0, 0.0)]
        for n in range(1, int(self.max_fraction * len(order)) + 1):
            kept[order[n - 1]] = 0
            points.append(measure(classify(seen * kept).cpu(), n, activation[n - 1].item()))
        chosen = last_within(points, self.epsilon)
        kept[order[chosen.pruned :]] = 1
        return kept, chosen
