"""The label that two detectors both rank first in the unlearned model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import Evidence, LabelDetector
from rnp.detection.labels.mm_bd import MMBD
from rnp.detection.labels.neuron_noise import NeuronNoise
from rnp.errors import UserError
from rnp.types import ImageSet
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class Consensus(LabelDetector):
    """The smaller score of a class by `mm_bd` and `neuron_noise` on the unlearned model.

    Each score is divided by the `min_score` of its detector. A class scores 0 unless both
    detectors rank it first, with their `min_margin`.

    In an unlearned benign model each of them often predicts a class, but not the same one:
    `mm_bd` starts from noise, `neuron_noise` from images. A backdoor that survives unlearning
    draws both to its label. Of five benign models of CIFAR-10 one had a score of 1.17, the others
    0; `min_score` was chosen after the first three.

    Drawn at random: what the two detectors draw, one after the other.

    Source: ours; for the two detectors see their files. Unlearning as in Li et al., ICML 2023,
    section 3.
    """

    needs_unlearned: ClassVar[bool] = True
    min_classes: ClassVar[int] = 4  # of three, two detectors rank the same first too often

    min_score: Annotated[
        float,
        Ge(0),
        "highest score below which no label is predicted; at 1 both detectors predict it",
    ] = 1.5
    min_margin: Annotated[
        float, Ge(0), "lead over the second class below which no label is predicted"
    ] = 0.0
    margins: MMBD = MMBD()
    noise: NeuronNoise = NeuronNoise()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("margins", "noise"):
            divisor = getattr(self, name).min_score
            if not divisor > 0:
                raise UserError(f"consensus.{name}.min_score must be above 0, got {divisor:g}")

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """The score after unlearning a copy of `model` with the default settings.

        Raises: UserError as the two detectors do.
        """
        unlearned = Unlearn(until_collapse=False)(model, clean, rng=rng).model
        return self.score_unlearned(unlearned, clean, rng)

    def score_evidence(
        self, evidence: Evidence, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        return self.score_unlearned(evidence.unlearned, clean, rng)

    def score_unlearned(
        self, unlearned: nn.Module, clean: ImageSet, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """The score of a model that has been unlearned already."""
        pairs = [
            (detector, detector.score(unlearned, clean, rng=rng).float())
            for detector in (self.margins, self.noise)
        ]
        relative = [scores / detector.min_score for detector, scores in pairs]
        firsts = [torch.arange(len(scores)) == scores.argmax() for _, scores in pairs]
        in_lead = all(
            detector.verdict(scores).margin >= detector.min_margin for detector, scores in pairs
        )
        lowest = torch.stack(relative).amin(0)
        return lowest.clamp_min(0).where(torch.stack(firsts).all(0) & in_lead, 0.0)
