"""RNP-FT: RNP, then fine-tuning against the triggers that still work on the pruned model."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Interval
from torch import nn

from rnp.defenses.base import Repaired
from rnp.defenses.nc_unlearn import NCUnlearn
from rnp.defenses.rnp import RNP, RNPResult
from rnp.detection.base import RecoveredTrigger
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.seeds import child
from rnp.types import DefenseSet, Epoch, ImageSet, OnEpoch, no_callback
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class RNPFTResult(Repaired):
    """The repaired model, and what led to it.

    `triggers` are those of all labels in the given model, `rnp` is the result before fine-tuning.
    """

    triggers: list[RecoveredTrigger]
    rnp: RNPResult


@dataclass(frozen=True, kw_only=True)
class RNPFT(NCUnlearn):
    """RNP, then fine-tuning against the triggers of those suspected labels that are still active.

    RNP always acts first. The fine-tuning acts where pruning leaves a label active, in at most
    `tuning_rounds` rounds; where it leaves none, the result is that of RNP.

    Two kinds of labels are suspected: those whose trigger in the given model is abnormally small,
    as in `nc_unlearn`, and the label to which predictions drift most during unlearning. At the
    start of each round a trigger is recovered for each suspected label from the model so far. The
    label is active if this trigger is smaller than the median trigger of the given model. In the
    first round the label that `prediction_drift` reports is active in any case, since the size says
    little about a trigger that is no patch.

    A round fine-tunes against the triggers of all labels found active so far, those of the given
    model and those of the rounds, at a tenth of the learning rate of `ft`. The pruned model is the
    teacher: its outputs for images without trigger are the targets, which costs less clean accuracy
    than labels do. Half of the images have a rectangle erased, since a recovered trigger is a poor
    approximation of one that covers much of the image. The final weights are interpolated between
    those of the pruned and of the tuned model, which restores clean accuracy and hardly makes a
    removed backdoor active again.

    Drawn at random: what RNP, recovering the triggers and fine-tuning draw, from generators that
    depend on the seed of `rng` alone; the state of `rng` does not change.

    Source: Li et al., ICML 2023, for RNP and the drift; Wang et al., S&P 2019, sections IV and
    VI.C, for the triggers, the suspected labels and the fine-tuning; Zhong et al., AAAI 2020, for
    random erasing; Hinton et al., 2015, arXiv 1503.02531, for the teacher; Wortsman et al., CVPR
    2022, section 3, for the interpolation of weights. The combination is ours.
    """

    unlearn: Unlearn = Unlearn()
    recover: Recover = Recover()
    prune: Prune = Prune()
    lr: Annotated[float, Gt(0), "learning rate of the fine-tuning at the start of each round"] = (
        0.001
    )
    steps: Annotated[int, Gt(0), "optimizer steps of a round"] = 300
    trigger_fraction: Annotated[
        float, Interval(gt=0, le=1), "fraction of the images that carry a trigger in fine-tuning"
    ] = 0.3
    erase_fraction: Annotated[
        float,
        Interval(ge=0, le=1),
        "fraction of the images of which a random rectangle is erased in fine-tuning",
    ] = 0.5
    tuning_rounds: Annotated[
        int, Ge(1), "largest number of rounds of looking for active labels and fine-tuning"
    ] = 2
    interpolation: Annotated[
        float,
        Interval(gt=0, le=1),
        "position of the final weights between the pruned ones (0) and the tuned ones (1)",
    ] = 0.9

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> RNPFTResult:
        """Return a repaired copy of `model`; `on_epoch` receives RNP, then each round."""
        triggers = self.search.recover(model, defense_set.train, rng=child(rng, "triggers"))
        method = RNP(unlearn=self.unlearn, recover=self.recover, prune=self.prune)
        result = method.repair(model, defense_set, rng=rng, on_epoch=on_epoch)
        tuned, tuned_labels = self.fine_tune_against(
            copy.deepcopy(result.model),
            triggers,
            result.unlearned.trajectory,
            defense_set.all,
            rng=child(rng, "tune"),
            on_epoch=on_epoch,
        )
        return RNPFTResult(tuned, triggers=triggers, rnp=result, tuned_labels=tuned_labels)

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
        """Fine-tune the pruned model in place; return it and the labels that were active.

        Args:
            triggers: Those of all labels in the given model, in order.
            trajectory: That of unlearning the given model.
        """
        drift = PredictionDrift()
        drift_scores = drift.from_trajectory(trajectory, len(clean.classes))
        drift_label = drift.verdict(drift_scores).label
        suspected = {trigger.label for trigger in self.suspicious(triggers)}
        suspected.add(int(drift_scores.argmax()))
        median_size = torch.tensor([trigger.effective_size for trigger in triggers]).quantile(0.5)
        teacher = copy.deepcopy(repaired).eval().requires_grad_(False)
        known: dict[int, list[RecoveredTrigger]] = {}
        for index in range(self.tuning_rounds):
            active = [
                trigger
                for trigger in self.search.recover_for(sorted(suspected), repaired, clean, rng=rng)
                if trigger.effective_size < median_size
                or (index == 0 and trigger.label == drift_label)
            ]
            if not active:
                break
            for trigger in active:
                known.setdefault(trigger.label, [triggers[trigger.label]]).append(trigger)
            self.tune_against(
                list(itertools.chain.from_iterable(known.values())),
                repaired,
                clean,
                rng=rng,
                teacher=teacher,
                on_epoch=on_epoch,
            )
        interpolate(teacher, repaired, self.interpolation)
        return repaired, sorted(known)


def interpolate(start: nn.Module, end: nn.Module, position: float) -> None:
    """Move the weights of `end` in place to `position` between `start` (0) and `end` (1).

    Integer buffers stay as they are.
    """
    end_state = end.state_dict()
    state = {
        name: value.lerp(end_state[name], position)
        if value.is_floating_point()
        else end_state[name]
        for name, value in start.state_dict().items()
    }
    end.load_state_dict(state)
