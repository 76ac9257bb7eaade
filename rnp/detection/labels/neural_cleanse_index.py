"""The label whose recovered trigger is abnormally small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import Evidence, LabelDetector, RecoveredTrigger, anomaly_index
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.types import ImageSet


@dataclass(frozen=True, kw_only=True)
class NeuralCleanseIndex(LabelDetector):
    """The score of a class is the anomaly index of its mask's size, above 0 where the mask is
    smaller than the median.

    Source: Wang et al., S&P 2019, section IV, with its threshold of 2.
    Differs: a mask that moves less than half of the images counts as the whole image; in a
    collapsed model an empty mask would else be the smallest.
    """

    needs_triggers: ClassVar[bool] = True

    min_score: Annotated[float, Ge(0), "highest index below which no label is named"] = 2.0
    min_margin: Annotated[
        float, Ge(0), "lead over the second class below which no label is named"
    ] = 0.0

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """By a recovery with its default settings, which draws at random; `from_triggers` takes
        any.
        """
        return self.from_triggers(NeuralCleanse().recover(model, clean, rng=rng))

    def score_evidence(
        self, evidence: Evidence, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        return self.from_triggers(evidence.triggers)

    def from_triggers(self, triggers: list[RecoveredTrigger]) -> Float[Tensor, "k"]:
        """The same score from triggers that were recovered before, one per class in order."""
        return anomaly_index(torch.tensor([trigger.size for trigger in triggers]))
