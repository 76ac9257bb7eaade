from __future__ import annotations

import math

import pytest
import torch
from planted import TARGET, Planted, images, rng
from torch import Tensor, nn

from rnp.detection.labels.mm_bd import MMBD, margins, surprise
from rnp.errors import UserError
from rnp.types import ImageSet


class Rows(nn.Module):
    """The logit of class c is the mean of row c times its weight: that is its maximum margin."""

    def __init__(self, *weights: float) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, x: Tensor) -> Tensor:
        return self.weights * x.mean((1, 3))[:, : len(self.weights)]


def test_margins_are_leads_over_the_runner_up() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [5.0, 3.0, 9.0]])
    assert margins(logits, 1).tolist() == [2.0, -6.0]


def test_maximum_margins_of_a_linear_model() -> None:
    weights = [1.0, 2.0, 3.0, 0.5, 1.5, 1.0]
    largest = MMBD(steps=150).maximum_margins(Rows(*weights), images(), rng=rng())
    assert largest.tolist() == pytest.approx(weights, abs=0.02)


def test_surprise_under_an_exponential_distribution() -> None:
    """Margins of mean 1 and variance 1 make the gamma distribution an exponential one."""
    probability = 1 - (1 - math.exp(-7.0)) ** 4  # that the largest of four exceeds 7
    score = surprise(torch.tensor([0.0, 1.0, 7.0, 2.0]))[2]
    assert score.item() == pytest.approx(-math.log10(probability), rel=1e-4)


@pytest.mark.parametrize(
    "largest, label",
    [
        ([2.0, 3.0, 2.5, 30.0, 2.2, 2.8], 3),
        ([2.0, 3.0, 2.5, 3.3, 2.2, 2.8], None),
        ([20.0, 21.0, 19.0, 0.1, 20.5, 19.5], None),  # only a large margin is suspicious
        ([-3.0, -1.0, -2.0, -4.0, -1.0, -1.0], None),
        ([5.0] * 6, None),
    ],
)
def test_only_an_abnormally_large_margin_predicts_a_label(
    largest: list[float], label: int | None
) -> None:
    scores = surprise(torch.tensor(largest))
    assert scores.isfinite().all()
    assert MMBD().verdict(scores).label == label


def test_the_planted_label_is_predicted() -> None:
    verdict, benign = (
        MMBD().verdict(MMBD().score(model, images(), rng=rng()))
        for model in (Planted(), Planted(corner=0.0))
    )
    assert verdict.label == TARGET
    assert verdict.margin > 1
    assert benign.label is None


def test_two_classes_cannot_be_compared() -> None:
    two = ImageSet(images().images, images().labels % 2, ("a", "b"))
    with pytest.raises(UserError, match="got 2 classes; use prediction_drift"):
        MMBD().score(Rows(1.0, 1.0), two, rng=rng())


@pytest.mark.parametrize(
    "field, value",
    [("min_score", -1.0), ("min_margin", -1.0), ("starts", 0), ("steps", 0), ("lr", 0.0)],
)
def test_out_of_range_fields_are_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}.*{value:g}"):
        MMBD(**{field: value})
