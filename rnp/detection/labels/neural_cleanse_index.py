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
    """The anomaly index of the size of a class's mask, above 0 for one smaller than the median.

    Source: Wang et al., S&P 2019, section IV, with its threshold of 2.
    Differs: a mask that moves at most half of the images that the model does not assign to the
    label anyway counts as large as the image; otherwise an empty mask would be the smallest in a
    collapsed model.
    """

    needs_triggers: ClassVar[bool] = True

    min_score: Annotated[float, Ge(0), "highest index below which no label is predicted"] = 2.0
    min_margin: Annotated[
        float, Ge(0), "lead over the second class below which no label is predicted"
    ] = 0.0

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
        return anomaly_index(torch.tensor([trigger.effective_size for trigger in triggers]))
