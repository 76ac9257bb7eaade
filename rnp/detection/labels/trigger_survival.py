"""The label whose small trigger still works after the model has been unlearned."""

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
    """The smallness of a class's trigger, times its gain in the unlearned model.

    Every model has triggers for every class. A trigger made of clean features loses its effect
    when those are unlearned; the trigger of a backdoor keeps it. The smallness is the anomaly
    index of Neural Cleanse, of the logarithm of the size and not below 0: in a benign model the
    sizes for different classes differ by factors of up to five.

    Drawn at random: nothing, given the triggers and the unlearned model.

    Source: ours, from the finding of Li et al., ICML 2023, section 3, that unlearning clean images
    leaves the backdoor in place; triggers and index as in Wang et al., S&P 2019, section IV, with
    its threshold of 2.
    """

    needs_unlearned: ClassVar[bool] = True
    needs_triggers: ClassVar[bool] = True

    min_score: Annotated[float, Ge(0), "highest score below which no label is predicted"] = 2.0
    min_margin: Annotated[
        float, Ge(0), "lead over the second class below which no label is predicted"
    ] = 0.0

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """The score by triggers and an unlearned copy with the default settings.

        Drawn at random: what recovery and unlearning draw.
        """
        triggers = NeuralCleanse().recover(model, clean, rng=rng)
        unlearned = Unlearn(until_collapse=False)(model, clean, rng=rng).model
        return self.from_triggers(triggers, unlearned, clean)

    def score_evidence(
        self, evidence: Evidence, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        return self.from_triggers(evidence.triggers, evidence.unlearned, clean)

    def from_triggers(
        self, triggers: list[RecoveredTrigger], unlearned: nn.Module, clean: ImageSet
    ) -> Float[Tensor, "k"]:
        """The same score from given triggers, one per class in order, and a given unlearned copy.

        The triggers are those of the model before unlearning.
        """
        predicted = predict(unlearned, clean.images, precision=chosen_precision()).argmax(1)
        gains = [
            measure_trigger(t.label, t.mask, t.pattern, unlearned, clean, predicted).gain
            for t in triggers
        ]
        sizes = torch.tensor([trigger.effective_size for trigger in triggers])
        smallness = anomaly_index(sizes.log())
        return smallness.clamp_min(0) * torch.tensor(gains).clamp_min(0)
