"""The label whose small trigger goes on working after the model has been unlearned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import (
    Evidence,
    LabelDetector,
    RecoveredTrigger,
    anomaly_index,
    measure_trigger,
)
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.training.device import chosen_precision
from rnp.training.predict import predict
from rnp.types import ImageSet
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class TriggerSurvival(LabelDetector):
    """The score of a class is how abnormally small its trigger is, times what that trigger still
    adds in the unlearned model.

    Every model has triggers for every class. One that is made of clean features loses its effect
    when those are unlearned, that of a backdoor keeps it. The smallness is the anomaly index of
    Neural Cleanse, of the logarithm of the size and not below 0: in a benign model the sizes of
    different classes lie as far apart as factors of five.

    Source: ours, from the finding of Li et al., ICML 2023, section 3, that unlearning clean images
    leaves the backdoor in place; triggers and index as in Wang et al., S&P 2019, section IV, with
    its threshold of 2.
    """

    needs_unlearned: ClassVar[bool] = True
    needs_triggers: ClassVar[bool] = True

    min_score: Annotated[float, Ge(0), "highest score below which no label is named"] = 2.0
    min_margin: Annotated[
        float, Ge(0), "lead over the second class below which no label is named"
    ] = 0.0

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """With triggers and an unlearned copy by the default settings, which draw at random."""
        found = NeuralCleanse().recover(model, clean, rng=rng)
        return self.from_triggers(
            found, Unlearn(until_collapse=False)(model, clean, rng=rng).model, clean
        )

    def score_evidence(
        self, evidence: Evidence, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        return self.from_triggers(evidence.triggers, evidence.unlearned, clean)

    def from_triggers(
        self, triggers: list[RecoveredTrigger], unlearned: nn.Module, clean: ImageSet
    ) -> Float[Tensor, "k"]:
        """The same score from triggers of the given model, one per class in order, and its
        unlearned copy.
        """
        before = predict(unlearned, clean.images, precision=chosen_precision()).argmax(1)
        gains = [
            measure_trigger(
                each.label, each.mask, each.pattern, unlearned, clean, before, chosen_precision()
            ).gain
            for each in triggers
        ]
        smallness = anomaly_index(torch.tensor([each.size for each in triggers]).log())
        return smallness.clamp_min(0) * torch.tensor(gains).clamp_min(0)
