from __future__ import annotations

import math

import pytest
import torch
from planted import CORNER

from rnp.detection.base import (
    RecoveredTrigger,
    anomaly_index,
    iou,
    iou_top_k,
    score_detection,
    blend,
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
    assert iou(mask, CORNER) == 0.5 and iou_top_k(mask, CORNER) == 1.0
    assert iou(torch.zeros(8, 8), CORNER) == 0.0


def test_gain_is_success_over_the_baseline() -> None:
    def gain(success: float, baseline: float) -> float:
        return RecoveredTrigger(0, torch.zeros(2, 2), torch.zeros(3, 2, 2), success, baseline).gain

    assert gain(0.9, 0.0) == 0.9 and gain(0.9, 0.8) == pytest.approx(0.5)
    assert gain(0.8, 0.8) == 0.0 and gain(1.0, 1.0) == 0.0


def test_a_trigger_mixes_its_pattern_in() -> None:
    trigger = RecoveredTrigger(
        0, torch.tensor([[0.0, 1.0], [0.25, 0.0]]), torch.ones(3, 2, 2), 1.0, 0.0
    )
    assert trigger.l1 == 1.25
    assert trigger.apply(torch.zeros(4, 3, 2, 2)).eq(trigger.mask).all()
    assert blend(torch.full((2,), 0.5), torch.tensor(1.0), torch.zeros(2)).tolist() == [0, 0]


def test_separable_scores_are_judged_perfect() -> None:
    defense = torch.linspace(0, 1, 101)
    assert threshold(defense) == pytest.approx(0.95)
    scores = torch.cat([torch.linspace(0, 1, 20), torch.linspace(2, 3, 5)])
    triggered = torch.arange(25) >= 20
    result = score_detection(scores, triggered, torch.arange(25) == 19, defense)
    assert (result.auroc, result.auprc, result.base_rate, result.tpr_at_5_fpr) == pytest.approx(
        (1.0, 1.0, 0.2, 1.0)
    )
    assert result.fpr == pytest.approx(1 / 20) and result.fpr_target_class == 1.0


def test_the_threshold_comes_from_the_defense_set_alone() -> None:
    scores, triggered = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([False, False, True, True])
    nobody = torch.zeros(4, dtype=torch.bool)
    strict = score_detection(scores, triggered, nobody, torch.full((10,), 2.5))
    assert (strict.auroc, strict.tpr_at_5_fpr, strict.fpr) == (1.0, 0.5, 0.0)
    assert math.isnan(strict.fpr_target_class)
