"""RNP, and a short tuning against the triggers that pruning left open: each removes what the other
does not see.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from torch import nn

from rnp.defenses.base import Repaired
from rnp.defenses.nc_unlearn import NCUnlearn
from rnp.defenses.rnp import RNP
from rnp.detection.base import RecoveredTrigger
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.seeds import child
from rnp.types import DefenseSet, Epoch, ImageSet, OnEpoch, no_callback
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class RNPFT(NCUnlearn):
    """Where the pruned model still yields to a small trigger of a label under suspicion, it is
    tuned against that trigger.

    Under suspicion are the labels whose trigger in the given model is abnormally small, and the
    one to which its predictions drift in unlearning. Such a label is open while the pruned model's
    trigger for it is smaller than that of the median label in the given model; at first it is open
    also where the drift is clear enough for `prediction_drift` to name it, since of a trigger that is
    no patch the size says little. The tuning is against both triggers. It is taught by the pruned
    model, at a tenth of a fine-tuning's learning rate: each image is to be what that model says of
    it without a trigger, which costs less clean accuracy than labels do. Half of its images are
    painted over in part, since a trigger that was recovered is a poor picture of one that covers
    much of the image. The weights go `share` of the way from the pruned model to the tuned one,
    which gives accuracy back and hardly opens what was shut. Where no label is open this is RNP
    and no more.

    Drawn at random: what recovering triggers, unlearning, recovery of the masks and tuning draw.

    Source: Li et al., ICML 2023, for the pruning and the drift; Wang et al., S&P 2019, sections IV
    and VI.C, for the search, the suspicion and the tuning against what was found; Zhong et al.,
    AAAI 2020, for the painting; Hinton et al., 2015, arXiv 1503.02531, for the teacher; Wortsman
    et al., CVPR 2022, section 3, for the way between two models. The union is ours.
    """

    unlearn: Unlearn = Unlearn()
    recover: Recover = Recover()
    prune: Prune = Prune()
    lr: Annotated[float, "learning rate of the tuning at the start of each round"] = 0.001
    steps: Annotated[int, "optimizer steps of a round"] = 300
    trigger_fraction: Annotated[float, "share of the images that carry a trigger in the tuning"] = (
        0.3
    )
    erase_fraction: Annotated[
        float, "share of the images of which a rectangle is painted over in the tuning"
    ] = 0.5
    tuning_rounds: Annotated[
        int, Ge(1), "times that open labels are looked for and tuned against, at most"
    ] = 2
    interpolation: Annotated[
        float,
        Interval(gt=0, le=1),
        "part of the way from the pruned weights to the tuned ones that is gone",
    ] = 0.9

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        triggers = self.search.recover(model, defense_set.train, rng=child(rng, "triggers"))
        method = RNP(unlearn=self.unlearn, recover=self.recover, prune=self.prune)
        result = method.repair(model, defense_set, rng=rng, on_epoch=on_epoch)
        tuned, _ = self.fine_tune_against(
            result.model,
            triggers,
            result.unlearned.trajectory,
            defense_set.all,
            rng=child(rng, "tune"),
            on_epoch=on_epoch,
        )
        return Repaired(tuned)

    def fine_tune_against(
        self,
        repaired: nn.Module,
        triggers: Sequence[RecoveredTrigger],
        trajectory: list[Epoch],
        clean: ImageSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> tuple[nn.Module, list[int]]:
        """Change the pruned model in place; that model, and the labels that were found open.

        `triggers` are those of all labels in the given model, `trajectory` is that of its
        unlearning.
        """
        drift = PredictionDrift()
        shares = drift.from_trajectory(trajectory, len(clean.classes))
        named = drift.verdict(shares).label
        labels = {trigger.label for trigger in self.suspicious(triggers)} | {int(shares.argmax())}
        usual = torch.tensor([trigger.effective_size for trigger in triggers]).quantile(0.5)
        against: dict[int, list[RecoveredTrigger]] = {}
        teacher = copy.deepcopy(repaired).eval().requires_grad_(False)
        for done in range(self.tuning_rounds):
            found = [
                each
                for each in self.search.recover_for(sorted(labels), repaired, clean, rng=rng)
                if each.effective_size < usual or (done == 0 and each.label == named)
            ]
            if not found:
                break
            for each in found:
                against.setdefault(each.label, [triggers[each.label]]).append(each)
            self.tune_against(
                sum(against.values(), []),
                repaired,
                clean,
                rng=rng,
                teacher=teacher,
                on_epoch=on_epoch,
            )
        tuned = repaired.state_dict()
        repaired.load_state_dict(
            {
                name: (
                    value.lerp(tuned[name], self.interpolation)
                    if value.is_floating_point()
                    else tuned[name]
                )
                for name, value in teacher.state_dict().items()
            }
        )
        return repaired, sorted(against)
