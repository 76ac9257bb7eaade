"""The label whose recovered trigger is much smaller than that of every other label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import Evidence, LabelDetector, RecoveredTrigger
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.types import ImageSet


@dataclass(frozen=True, kw_only=True)
class TriggerSize(LabelDetector):
    """The logarithm of the median size of the triggers over the size of the class's own.

    The verdict asks that the second smallest trigger be nearly twice as large as the smallest
    (`min_margin`). The index of `neural_cleanse_index` has no such demand, and divides by the
    median deviation of a few classes, which is sometimes tiny.

    Source: Wang et al., S&P 2019, section IV, for the triggers; the verdict is ours.
    """

    needs_triggers: ClassVar[bool] = True

    min_score: Annotated[
        float, Ge(0), "logarithm of median over smallest size below which no label is predicted"
    ] = 0.55
    min_margin: Annotated[
        float, Ge(0), "logarithm of second over smallest size below which no label is predicted"
    ] = 0.55

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """The score by triggers that are recovered with the default settings.

        Drawn at random: what the recovery draws.
        """
        return self.from_triggers(NeuralCleanse().recover(model, clean, rng=rng))

    def score_evidence(
        self, evidence: Evidence, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        return self.from_triggers(evidence.triggers)

    def from_triggers(self, triggers: list[RecoveredTrigger]) -> Float[Tensor, "k"]:
        """The same score from given triggers, one per class in order."""
        sizes = torch.tensor([trigger.effective_size for trigger in triggers]).clamp_min(1e-3).log()
        return sizes.median() - sizes
