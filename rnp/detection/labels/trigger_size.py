"""The label whose recovered trigger is much smaller than that of every other label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from rnp.detection.base import RecoveredTrigger
from rnp.detection.labels.neural_cleanse_index import NeuralCleanseIndex


@dataclass(frozen=True, kw_only=True)
class TriggerSize(NeuralCleanseIndex):
    """The logarithm of the median size of the triggers over the size of the class's own.

    The verdict asks that the second smallest trigger be nearly twice as large as the smallest
    (`min_margin`). The index of `neural_cleanse_index` has no such demand, and divides by the
    median deviation of a few classes, which is sometimes tiny.

    Source: Wang et al., S&P 2019, section IV, for the triggers; the verdict is ours.
    """

    min_score: Annotated[
        float, Ge(0), "logarithm of median over smallest size below which no label is predicted"
    ] = 0.55
    min_margin: Annotated[
        float, Ge(0), "logarithm of second over smallest size below which no label is predicted"
    ] = 0.55

    def from_triggers(self, triggers: list[RecoveredTrigger]) -> Float[Tensor, "k"]:
        """The score from given triggers, one per class in order."""
        sizes = torch.tensor([trigger.effective_size for trigger in triggers]).clamp_min(1e-3).log()
        return sizes.median() - sizes
