from __future__ import annotations

import math

import pytest
import torch
from planted import CORNER

from rnp.detection.base import (
    RecoveredTrigger,
    anomaly_index,
    blend,
    iou,
    iou_top_k,
    score_detection,
    threshold,
)


def test_anomaly_index_counts_deviations_below_the_median() -> None:
    index = anomaly_index(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))  # median 3, median deviation 1
    assert index[:4] == pytest.approx(torch.tensor([2.0, 1.0, 0.0, -1.0]) / 1.4826)
    assert index[4] < -60


def test_anomaly_index_of_equal_values_is_zero() -> None:
    assert anomaly_index(torch.full((5,), 7.0)).tolist() == [0.0] * 5


def test_iou_of_a_mask_on_half_of_the_support() -> None:
    mask = torch.full((8, 8), 0.1)
    mask[6, 6:] = 0.9  # two of the four pixels
    assert iou(mask, CORNER) == 0.5
    mask[7, 6:] = 0.2  # the next highest
    assert iou(mask, CORNER) == 0.5
    assert iou_top_k(mask, CORNER) == 1.0
    assert iou(torch.zeros(8, 8), CORNER) == 0.0


MASK = torch.tensor([[0.0, 1.0], [0.25, 0.0]])


def trigger(success: float = 1.0, baseline: float = 0.0) -> RecoveredTrigger:
    return RecoveredTrigger(0, MASK, torch.ones(3, 2, 2), success, baseline)


def test_gain_is_success_above_the_baseline() -> None:
    assert trigger(0.9, 0.0).gain == 0.9
    assert trigger(0.9, 0.8).gain == pytest.approx(0.5)
    assert trigger(0.8, 0.8).gain == 0.0
    assert trigger(1.0, 1.0).gain == 0.0


@pytest.mark.parametrize(
    "success, baseline, size",
    [
        (1.0, 0.0, 1.25),
        (0.51, 0.0, 1.25),
        (0.5, 0.0, 4.0),
        (0.91, 0.8, 1.25),
        (0.89, 0.8, 4.0),  # it moves less than half of the fifth that the baseline leaves
        (1.0, 1.0, 4.0),  # nothing is left to move
    ],
)
def test_a_weak_trigger_counts_as_the_whole_image(success, baseline, size) -> None:
    assert trigger(success, baseline).effective_size == size


def test_a_trigger_blends_its_pattern_in() -> None:
    assert trigger().l1 == 1.25
    assert trigger().apply(torch.zeros(4, 3, 2, 2)).eq(MASK).all()
    assert blend(torch.full((2,), 0.5), torch.tensor(1.0), torch.zeros(2)).tolist() == [0, 0]


def test_separable_scores_are_perfect() -> None:
    clean_scores = torch.linspace(0, 1, 101)
    assert threshold(clean_scores) == pytest.approx(0.95)
    scores = torch.cat([torch.linspace(0, 1, 20), torch.linspace(2, 3, 5)])
    triggered = torch.arange(25) >= 20
    result = score_detection(scores, triggered, torch.arange(25) == 19, clean_scores)
    assert (result.auroc, result.auprc, result.tpr_at_5_fpr) == pytest.approx((1.0, 1.0, 1.0))
    assert result.base_rate == pytest.approx(0.2)
    assert result.fpr == pytest.approx(1 / 20) and result.fpr_target_class == 1.0


def test_the_threshold_comes_from_the_defense_set_alone() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0])
    triggered = torch.tensor([False, False, True, True])
    target_class = torch.zeros(4, dtype=torch.bool)
    result = score_detection(scores, triggered, target_class, torch.full((10,), 2.5))
    assert (result.auroc, result.tpr_at_5_fpr, result.fpr) == (1.0, 0.5, 0.0)
    assert math.isnan(result.fpr_target_class)
