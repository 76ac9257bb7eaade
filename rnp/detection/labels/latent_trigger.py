"""The label that the smallest shift of the features sends all images to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import (
    LabelDetector,
    LabelVerdict,
    penultimate_features,
    unless_chance,
)
from rnp.errors import UserError
from rnp.models.features import head
from rnp.types import ImageSet, Labels


@dataclass(frozen=True, kw_only=True)
class LatentTrigger(LabelDetector):
    """How small a shift of the features sends the images of other classes to a class.

    The score is the logarithm of the median of the norms over the class's own. One shift serves
    all images, so that of each class is the solution of a small quadratic program, however many
    images there are, and no trigger has to be searched for in the pixels. A backdoor of any shape
    has left room in the features for such a shift.

    Nothing is drawn at random.

    Source: Iwahana et al., 2025, arXiv 2511.08944, for the latent trigger. The program and the
    verdict by the lead are ours.
    """

    min_classes: ClassVar[int] = 4  # with three, any lead can be chance
    judges_unlearned: ClassVar[bool] = False

    min_score: Annotated[
        float, Ge(0), "logarithm of median over smallest norm below which no label is predicted"
    ] = 0.05
    min_margin: Annotated[
        float, Ge(0), "logarithm of second over smallest norm below which no label is predicted"
    ] = 0.05
    max_p_value: Annotated[
        float,
        Interval(gt=0, le=1),
        "probability of so high a score by chance above which no label is predicted",
    ] = 0.02
    share: Annotated[
        float,
        Interval(gt=0, le=1),
        "images of the other classes that prefer the class to each other one after the shift",
    ] = 0.97
    steps: Annotated[int, Gt(0), "steps of the solver"] = 2000

    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """One score per class.

        Raises: UserError when there are fewer than four classes, or no linear layer at the end.
        """
        if obstacle := self.obstacle(model, len(clean.classes)):
            raise UserError(f"latent_trigger {obstacle}; use neural_cleanse_index")
        layer = head(model)
        features = penultimate_features(model, clean.images)[0].double()
        weight = layer.weight.detach().double().cpu()  # [k, d]
        bias = 0 if layer.bias is None else layer.bias.detach().double().cpu()
        leads = self.leads(features @ weight.T + bias, clean.labels)
        norms = smallest_shifts(weight, leads, self.steps).norm(dim=1).clamp_min(1e-12)
        return (norms.median().log() - norms.log()).float()

    def verdict(self, scores: Float[Tensor, "k"]) -> LabelVerdict:
        """That of the score and its lead, unless the highest score can be chance."""
        return unless_chance(super().verdict(scores), scores, self.max_p_value)

    def obstacle(self, model: nn.Module, num_classes: int) -> str:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not layers or layers[-1].out_features != num_classes:
            return f"needs a linear layer with {num_classes} outputs at the end"
        return super().obstacle(model, num_classes)

    def leads(self, logits: Float[Tensor, "n k"], labels: Labels) -> Float[Tensor, "k k"]:
        """[c, j]: the lead of class j over class c that a `share` of the other images stay below.

        The diagonal is 0.
        """
        rows = []
        for label in range(logits.shape[1]):
            others = logits[labels != label]
            rows.append((others - others[:, [label]]).quantile(self.share, dim=0))
        return torch.stack(rows)


def smallest_shifts(
    weight: Float[Tensor, "k d"], leads: Float[Tensor, "k k"], steps: int
) -> Float[Tensor, "k d"]:
    """For each class c the smallest s with (weight[c] - weight[j]) s >= leads[c, j] for all j.

    Solves the dual programs of all classes together by accelerated projected gradient ascent.
    """
    centered = weight - weight.mean(0)
    # At least the norm of the matrix with the rows weight[c] - weight[j].
    norms = len(weight) ** 0.5 * centered.norm(dim=1) + torch.linalg.matrix_norm(centered, 2)
    step = 1 / norms.square().unsqueeze(1)
    multipliers = torch.zeros_like(leads)
    ahead = multipliers
    for i in range(steps):
        shifts = combine(weight, ahead)
        scores = shifts @ weight.T  # [c, j]
        slack = leads - (scores.diagonal().unsqueeze(1) - scores)
        following = (ahead + step * slack).clamp_min(0).fill_diagonal_(0)
        ahead = following + i / (i + 3) * (following - multipliers)
        multipliers = following
    return combine(weight, multipliers)


def combine(
    weight: Float[Tensor, "k d"], multipliers: Float[Tensor, "k k"]
) -> Float[Tensor, "k d"]:
    """Row c: the sum over j of multipliers[c, j] (weight[c] - weight[j])."""
    return multipliers.sum(1, keepdim=True) * weight - multipliers @ weight
