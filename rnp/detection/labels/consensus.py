"""The label that two detectors, asked of the unlearned copy, both put first."""

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
    """The score of a class is the smaller of its scores by `mm_bd` and `neuron_noise`, each as a
    share of what that one names a label at; 0 for every class that one of the two does not put
    first, by its least margin.

    In an unlearned benign model either of them is prone to name a class, but not the same one: the
    margins start from noise, the predictions from images. A backdoor that outlives unlearning
    draws both to its label. Of five benign models of CIFAR-10 one had a score of 1.17, the others
    0; `least_score` was settled after the first three.

    Source: ours; the two detectors name theirs. Unlearning as in Li et al., ICML 2023, section 3.
    """

    needs_unlearned: ClassVar[bool] = True
    min_classes: ClassVar[int] = MMBD.min_classes

    min_score: Annotated[
        float, Ge(0), "highest score below which no label is named; at 1 both detectors name it"
    ] = 1.5
    min_margin: Annotated[
        float, Ge(0), "lead over the second class below which no label is named"
    ] = 0.0
    margins: MMBD = MMBD()
    noise: NeuronNoise = NeuronNoise()

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("margins", "noise"):
            if not getattr(self, name).min_score > 0:
                raise UserError(
                    f"consensus.{name}.min_score must be above 0, got"
                    f" {getattr(self, name).min_score:g}"
                )

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """With an unlearned copy by the default settings. Raises: UserError as the two detectors
        do.
        """
        return self.score_unlearned(
            Unlearn(until_collapse=False)(model, clean, rng=rng).model, clean, rng
        )

    def score_evidence(
        self, evidence: Evidence, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        return self.score_unlearned(evidence.unlearned, clean, rng)

    def score_unlearned(
        self, unlearned: nn.Module, clean: ImageSet, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        said = [
            (each, each.score(unlearned, clean, rng=rng).float())
            for each in (self.margins, self.noise)
        ]
        least = torch.stack([scores / each.min_score for each, scores in said]).amin(0)
        first = torch.stack(
            [torch.arange(len(scores)) == scores.argmax() for _, scores in said]
        ).all(0)
        lead = all(each.verdict(scores).margin >= each.min_margin for each, scores in said)
        return least.clamp_min(0).where(first & lead, 0.0)
