"""FP: prune the features that clean images excite least, then fine-tune."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defenses.base import Repaired, TuningDefense
from rnp.models.features import features, head
from rnp.prune import SweepMeter, SweepPoint, last_within_budget
from rnp.training.device import device_of
from rnp.training.predict import eval_batches
from rnp.types import DefenseSet, ImageSet, OnEpoch, no_callback, to_floats


@dataclass(frozen=True, kw_only=True)
class FP(TuningDefense):
    """Fine-pruning: the channels that feed the classifier, by mean activation; what is pruned
    stays so in fine-tuning.

    Source: Liu et al., RAID 2018, "Fine-pruning"; the fine-tuning is that of the defense `ft`, but
    shorter.
    Differs: a channel is pruned where the classifier reads it, since in a residual network no
    scale silences it; tolerance on the defender's own images, in absolute terms, where public code
    takes test images; features one by one.
    """

    max_accuracy_drop: Annotated[
        float,
        Interval(ge=0, lt=1),
        "accuracy that pruning may cost on the defense set, as a fraction",
    ] = 0.04
    max_fraction: Annotated[
        float, Interval(ge=0, lt=1), "share of the features that may be pruned at all"
    ] = 0.6
    steps: Annotated[int, "optimizer steps of the fine-tuning"] = 200

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        tuned = copy.deepcopy(model).eval()
        kept, chosen = self.prune(tuned, defense_set.all, self.score(tuned, defense_set, rng=rng))

        @torch.no_grad()
        def cut() -> None:
            head(tuned).weight.mul_(kept)

        cut()
        return Repaired(
            self.tune(tuned, defense_set.train, rng=rng, after_step=cut, on_epoch=on_epoch),
            chosen=chosen,
        )

    def score(
        self, model: nn.Module, defense_set: DefenseSet, *, rng: torch.Generator
    ) -> Float[Tensor, "d"]:
        """One value per feature, the lowest goes first: its mean activation on clean images."""
        return penultimate_features(model, defense_set.all).mean(0)

    @torch.no_grad()
    def prune(
        self, model: nn.Module, clean: ImageSet, score: Float[Tensor, "d"]
    ) -> tuple[Tensor, SweepPoint]:
        """A 0 for each feature that goes and a 1 for the others, and what that does to the
        accuracy on `clean`.
        """
        values, order = score.sort(stable=True)
        known, classify = penultimate_features(model, clean), head(model)
        kept, measure = torch.ones_like(known[0]), SweepMeter(clean.labels)
        points = [measure(classify(known).cpu(), 0, 0.0)]
        for n in range(1, int(self.max_fraction * len(order)) + 1):
            kept[order[n - 1]] = 0
            points.append(measure(classify(known * kept).cpu(), n, values[n - 1].item()))
        chosen = last_within_budget(points, self.max_accuracy_drop)
        kept[order[chosen.pruned :]] = 1
        return kept, chosen


@torch.no_grad()
def penultimate_features(model: nn.Module, clean: ImageSet) -> Float[Tensor, "n d"]:
    """What the classifier at the end reads of each image."""
    device = device_of(model)
    return torch.cat(
        [features(model, to_floats(part.to(device)))[0] for part in eval_batches(clean.images)]
    )
