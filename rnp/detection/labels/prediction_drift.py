"""The label that images of other classes are assigned to while the model is unlearned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import Evidence, LabelDetector
from rnp.training.predict import class_shares, predict
from rnp.types import Epoch, ImageSet


@dataclass(frozen=True, kw_only=True)
class PredictionDrift(LabelDetector):
    """A class's share of the predictions for images of *other* classes, in [0, 1].

    A benign model collapses to some class too: the verdict is the label of a backdoor, if there is
    one, and no proof that there is.

    Source: Li et al., ICML 2023, Algorithm 1, line 5.
    Differs: images of the class itself do not count, so that the remaining accuracy does not
    either; `from_trajectory` averages over the whole unlearning up to the collapse, since between
    accuracies of 0.5 and 0.2 a wrong class may lead.
    """

    needs_unlearned: ClassVar[bool] = True

    min_score: Annotated[
        float, Interval(ge=0, le=1), "highest share below which no label is predicted"
    ] = 0.5
    min_margin: Annotated[
        float, Interval(ge=0, le=1), "lead over the second class below which no label is predicted"
    ] = 0.2
    collapse_power: Annotated[
        float, Ge(0), "weight of a step of the unlearning: (1 - accuracy) to this power"
    ] = 4.0

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """The shares in `model`, which is the most collapsed of the unlearned checkpoints."""
        predicted = predict(model, clean.images).argmax(1)
        return class_shares(predicted, clean.labels, len(clean.classes))

    def score_evidence(
        self, evidence: Evidence, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        return self.from_trajectory(evidence.trajectory, len(clean.classes))

    def from_trajectory(self, rows: list[Epoch], k: int) -> Float[Tensor, "k"]:
        """The weighted mean of the shares along an unlearning; late, collapsed steps weigh most.

        It is 0 for all of the `k` classes when unlearning took every step back.
        """
        table = [[row.extra[f"share/{c}"] for c in range(k)] for row in rows]
        shares = torch.tensor(table).reshape(-1, k)  # [t, k]
        weights = torch.tensor([1 - row.accuracy for row in rows]) ** self.collapse_power  # [t]
        return weights @ shares / weights.sum().clamp_min(1e-12)
