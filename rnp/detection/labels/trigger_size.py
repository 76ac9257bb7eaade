"""The label whose recovered trigger is much smaller than that of every other label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Interval
from jaxtyping import Float
from torch import Tensor

from rnp.detection.base import LabelVerdict, RecoveredTrigger, unless_chance
from rnp.detection.labels.neural_cleanse_index import NeuralCleanseIndex

LARGE = 0.7
"""Triggers larger than twice the median (in logarithms) tell little and vary widely."""
COMPARABLE = 4
"""The number of classes from which on their triggers are compared with each other."""
USUAL_SHARE = 0.015
"""Of the image: of nine benign models with three classes (`experiments.recipes`) none had a
trigger so small."""


@dataclass(frozen=True, kw_only=True)
class TriggerSize(NeuralCleanseIndex):
    """The logarithm of the median size of the triggers over the size of the class's own.

    A trigger larger than twice the median counts as twice as large. With fewer than four classes a
    fixed share of the image (`USUAL_SHARE`) takes the place of the median, and the score and its
    lead decide alone: the trigger of one benign class is often many times as large as another's.

    With four classes and more the verdict asks that the second smallest trigger be a third larger
    than the smallest (`min_margin`), and that so small a trigger be no chance (`max_p_value`): the
    sizes of the other classes differ, too. A second smallest trigger three times as large
    (`sure_margin`) is enough by itself. The index of `neural_cleanse_index` divides by the median
    deviation of a few classes, which is sometimes tiny. The thresholds were chosen with the models
    of seed 0 of `cifar10-fast`, four published networks, ten architectures and the first 24 benign
    models of `experiments.recipes` in view, the fixed share with those that have three classes.

    Source: Wang et al., S&P 2019, section IV, for the triggers; the verdict is ours.
    """

    min_score: Annotated[
        float, Ge(0), "logarithm of usual over smallest size below which no label is predicted"
    ] = 0.3
    min_margin: Annotated[
        float, Ge(0), "logarithm of second over smallest size below which no label is predicted"
    ] = 0.3
    max_p_value: Annotated[
        float,
        Interval(gt=0, le=1),
        "probability of so high a score by chance above which no label is predicted",
    ] = 0.02
    sure_margin: Annotated[
        float,
        Ge(0),
        "logarithm of second over smallest size from which on chance is excluded",
    ] = 1.1

    def from_triggers(self, triggers: list[RecoveredTrigger]) -> Float[Tensor, "k"]:
        """The score from given triggers, one per class in order."""
        sizes = torch.tensor([trigger.effective_size for trigger in triggers]).clamp_min(1e-3).log()
        usual = sizes.median()
        if len(triggers) < COMPARABLE:
            usual = torch.tensor(USUAL_SHARE * triggers[0].mask.numel()).log()
        return (usual - sizes).clamp_min(-LARGE)

    def verdict(self, scores: Float[Tensor, "k"]) -> LabelVerdict:
        """That of the score and its lead, unless the highest score can be chance."""
        verdict = super().verdict(scores)
        if len(scores) < COMPARABLE or verdict.margin >= self.sure_margin:
            return verdict
        return unless_chance(verdict, scores, self.max_p_value)
