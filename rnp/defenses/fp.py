"""FP: prune the features with the lowest mean activation on clean images, then fine-tune."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt, Interval
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
    """Fine-pruning: features pruned by their mean activation stay pruned during fine-tuning.

    Features are the inputs of the classifier at the end.

    Drawn at random: the order of the images and their augmentation.

    Source: Liu et al., RAID 2018, "Fine-pruning"; the fine-tuning is that of the defense `ft`, but
    shorter.
    Differs: a feature is pruned by zeroing the classifier's weights for it, since in a residual
    network no single scale silences it; the tolerance holds on the defender's own images and in
    absolute terms, where public code uses test images; features are pruned one by one.
    """

    max_accuracy_drop: Annotated[
        float,
        Interval(ge=0, lt=1),
        "accuracy that pruning may cost on the defense set, as a fraction",
    ] = 0.04
    max_fraction: Annotated[
        float, Interval(ge=0, lt=1), "largest fraction of the features to prune"
    ] = 0.6
    steps: Annotated[int, Gt(0), "optimizer steps of the fine-tuning"] = 200

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        tuned = copy.deepcopy(model).eval()
        score = self.score(tuned, defense_set, rng=rng)
        kept, chosen = self.prune(tuned, defense_set.all, score)

        @torch.no_grad()
        def zero_pruned() -> None:
            head(tuned).weight.mul_(kept)

        zero_pruned()
        self.tune(tuned, defense_set.train, rng=rng, after_step=zero_pruned, on_epoch=on_epoch)
        return Repaired(tuned, chosen=chosen)

    def score(
        self, model: nn.Module, defense_set: DefenseSet, *, rng: torch.Generator
    ) -> Float[Tensor, "d"]:
        """The mean activation of each feature on clean images; the lowest is pruned first."""
        return penultimate_features(model, defense_set.all).mean(0)

    @torch.no_grad()
    def prune(
        self, model: nn.Module, clean: ImageSet, score: Float[Tensor, "d"]
    ) -> tuple[Float[Tensor, "d"], SweepPoint]:
        """A factor per feature, 0 if pruned and 1 if kept, and the point of the sweep on `clean`
        at which pruning stops.
        """
        values, order = score.sort(stable=True)
        activations = penultimate_features(model, clean)  # [n, d]
        classifier = head(model)
        measure = SweepMeter(clean.labels)
        kept = torch.ones_like(activations[0])
        points = [measure(classifier(activations).cpu(), 0, 0.0)]
        for n in range(1, int(self.max_fraction * len(order)) + 1):
            kept[order[n - 1]] = 0
            points.append(measure(classifier(activations * kept).cpu(), n, values[n - 1].item()))
        chosen = last_within_budget(points, self.max_accuracy_drop)
        kept[order[chosen.pruned :]] = 1
        return kept, chosen


@torch.no_grad()
def penultimate_features(model: nn.Module, clean: ImageSet) -> Float[Tensor, "n d"]:
    """The inputs of the classifier at the end of `model`, for all images of `clean`."""
    device = device_of(model)
    batches = eval_batches(clean.images)
    return torch.cat([features(model, to_floats(batch.to(device)))[0] for batch in batches])
