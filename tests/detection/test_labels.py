from __future__ import annotations

import dataclasses

import pytest
import torch
from planted import CLASSES, CORNER, TARGET, Planted, images, rng
from torch import Tensor

from rnp.detection.base import (
    Evidence,
    LabelDetector,
    LabelVerdict,
    RecoveredTrigger,
    anomaly_index,
)
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.mm_bd import MMBD
from rnp.detection.labels.neural_cleanse_index import NeuralCleanseIndex
from rnp.detection.labels.neuron_noise import NeuronNoise
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.labels.trigger_survival import TriggerSurvival
from rnp.errors import UserError
from rnp.types import Epoch


def row(accuracy: float, *shares: float) -> Epoch:
    extra = {f"share/{c}": share for c, share in enumerate(shares)}
    return Epoch(
        epoch=0,
        step=0,
        loss=0.0,
        accuracy=accuracy,
        learning_rate=0.0,
        gradient_norm=0.0,
        extra=extra,
    )


def sized(*sizes: int, baseline: float = 0.0) -> list[RecoveredTrigger]:
    """One trigger per class whose mask covers that many pixels; `baseline` is that of the
    smallest.
    """
    masks = [(torch.arange(64) < size).float().view(8, 8) for size in sizes]
    return [
        RecoveredTrigger(
            label, mask, torch.zeros(3, 8, 8), 1.0, baseline if mask.sum() == min(sizes) else 0.0
        )
        for label, mask in enumerate(masks)
    ]


def test_images_of_a_class_do_not_speak_for_it() -> None:
    assert PredictionDrift().score(Planted(), images(), rng=rng()).tolist() == [0.0] * CLASSES


def test_the_label_of_a_collapsed_model_has_all_shares() -> None:
    detector = PredictionDrift()
    scores = detector.score(Planted(bias=50.0), images(), rng=rng())
    assert scores.tolist() == [float(c == TARGET) for c in range(CLASSES)]
    assert detector.verdict(scores) == LabelVerdict(TARGET, 1.0)


def test_a_trajectory_is_judged_by_its_collapse() -> None:
    rows = (
        [row(0.9, 0.0, 0.1, 0.0)] * 50
        + [row(0.5, 0.1, 0.4, 0.1)] * 5
        + [row(0.1, 0.0, 0.0, 0.9)] * 5
    )
    scores = PredictionDrift().from_trajectory(rows, 3)
    assert PredictionDrift().verdict(scores).label == 2
    early, late = 0.5**4 * 5, 0.9**4 * 5
    weights = 0.1**4 * 50 + early + late
    assert scores.tolist() == pytest.approx(
        [
            0.1 * early / weights,
            (0.1 * 0.1**4 * 50 + 0.4 * early) / weights,
            (0.1 * early + 0.9 * late) / weights,
        ],
        abs=1e-5,
    )


@pytest.mark.parametrize("rows", [[row(1.0, 0.0, 0.0)], []], ids=["stayed", "took every step back"])
def test_a_model_that_never_fell_names_no_label(rows) -> None:
    scores = PredictionDrift().from_trajectory(rows, 2)
    assert scores.shape == (2,) and PredictionDrift().verdict(scores) == LabelVerdict(None, 0.0)


@pytest.mark.parametrize(
    "scores, label",
    [
        ([0.1, 0.8, 0.1], 1),
        ([0.0, 0.45, 0.0], None),  # a small share
        ([0.55, 0.0, 0.45], None),  # a thin margin
    ],
)
def test_shares_need_height_and_lead(scores: list[float], label: int | None) -> None:
    assert PredictionDrift().verdict(torch.tensor(scores)).label == label


def test_the_index_names_the_planted_label() -> None:
    detector = NeuralCleanseIndex()
    verdict = detector.verdict(detector.score(Planted(), images(), rng=rng()))
    assert verdict.label == TARGET and verdict.margin > 2


@pytest.mark.parametrize(
    "sizes, label",
    [
        ((20, 21, 4, 19, 22), 2),
        ((20, 21, 60, 19, 22), None),  # only a small mask is suspicious
        ((20, 20, 20, 20, 20), None),
    ],
)
def test_the_index_flags_small_masks_only(sizes: tuple[int, ...], label: int | None) -> None:
    detector = NeuralCleanseIndex()
    assert detector.verdict(detector.from_triggers(sized(*sizes))).label == label


def test_a_label_reached_without_a_trigger_is_not_flagged() -> None:
    detector = NeuralCleanseIndex()
    assert (
        detector.verdict(detector.from_triggers(sized(20, 21, 1, 19, 22, baseline=1.0))).label
        is None
    )


class Forgetful(Planted):
    """What is left of the planted model when the rows are unlearned: everything is class 0, but
    for the backdoor.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.where(CORNER, x, 0.0)) + 0.1 * torch.eye(CLASSES)[0]


def test_the_trigger_of_a_backdoor_survives() -> None:
    """Rows of pixels work before and not after; class 0 takes every image without a trigger too."""
    rows = [(torch.arange(64).view(8, 8) // 8 == c).float() for c in range(CLASSES)]
    found = [
        RecoveredTrigger(
            c,
            CORNER.float() if c == TARGET else rows[c] * (1 + c) / 8,
            torch.ones(3, 8, 8),
            1.0,
            0.0,
        )
        for c in range(CLASSES)
    ]
    scores = TriggerSurvival().from_triggers(found, Forgetful(), images())
    index = anomaly_index(
        torch.tensor([1.0, 2, 3, 4, 5, 6]).log()
    )  # the corner has four pixels, the rows 1 to 6
    assert index[TARGET] < 0 and scores.tolist() == [0.0] * CLASSES, "it is not abnormally small"
    found[TARGET] = dataclasses.replace(found[TARGET], mask=CORNER * 0.9)
    for c, size in enumerate((30, 31, 32, None, 33, 34)):
        found[c] = (
            found[c] if size is None else dataclasses.replace(found[c], mask=rows[c] * size / 8)
        )
    scores = TriggerSurvival().from_triggers(found, Forgetful(), images())
    index = anomaly_index(torch.tensor([30, 31, 32, 3.6, 33, 34]).log())
    assert scores.tolist() == pytest.approx(
        [float(index[c]) * (c == TARGET) for c in range(CLASSES)], rel=1e-4
    )
    assert TriggerSurvival().verdict(scores).label == TARGET


def test_what_is_known_already_serves() -> None:
    """Each detector takes its part of the evidence, and only that."""
    found, rows = sized(20, 21, 4, 19, 22, 20), [row(0.1, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0)]
    evidence = Evidence(Planted(), found, Forgetful(), rows)
    shares, index, survival = (
        each.score_evidence(evidence, images(), rng=rng())
        for each in (PredictionDrift(), NeuralCleanseIndex(), TriggerSurvival())
    )
    assert torch.equal(shares, PredictionDrift().from_trajectory(rows, CLASSES)) and torch.equal(
        index, NeuralCleanseIndex().from_triggers(found)
    )
    assert torch.equal(survival, TriggerSurvival().from_triggers(found, Forgetful(), images()))
    margins = MMBD(starts=1, steps=2)
    assert torch.equal(
        margins.score_evidence(evidence, images(), rng=rng()),
        margins.score(Planted(), images(), rng=rng()),
    )


def saying(detector: LabelDetector, scores: tuple[float, ...]) -> LabelDetector:
    """The same detector, but what it says of the unlearned copy is known before."""

    class Saying(type(detector)):
        def score(self, model, clean, *, rng):
            assert isinstance(model, Forgetful)
            return torch.tensor(scores)

    return Saying(
        **{field.name: getattr(detector, field.name) for field in dataclasses.fields(detector)}
    )


@pytest.mark.parametrize(
    "margins, noise, scores, label",
    [
        ((0.0, 8.0, 4.0), (0.1, 0.8, 0.3), (0.0, 1.6, 0.0), 1),
        ((0.0, 8.0, 7.9), (0.1, 0.3, 0.6), (0.0, 0.0, 0.0), None),  # each names another one
        ((0.0, 8.0, 4.0), (0.1, 0.4, 0.1), (0.0, 0.8, 0.0), None),  # one is not sure
        ((0.0, 8.0, 4.0), (0.1, 0.6, 0.5), (0.0, 0.0, 0.0), None),  # or has a thin margin
    ],
)
def test_two_detectors_must_agree(margins, noise, scores, label) -> None:
    both = Consensus(
        margins=saying(MMBD(min_score=4.0), margins),
        noise=saying(NeuronNoise(min_score=0.5, min_margin=0.2), noise),
    )
    found = both.score_evidence(Evidence(Planted(), [], Forgetful(), []), images(), rng=rng())
    assert found.tolist() == pytest.approx(scores) and both.verdict(found).label == label


@pytest.mark.parametrize(
    "cls, field, value",
    [
        (Consensus, "min_score", -0.5),
        (TriggerSurvival, "min_score", -1.5),
        (TriggerSurvival, "min_margin", -0.1),
        (PredictionDrift, "min_score", 50.0),
        (PredictionDrift, "min_margin", -0.1),
        (PredictionDrift, "collapse_power", -1.0),
        (NeuralCleanseIndex, "min_score", -2.0),
        (NeuralCleanseIndex, "min_margin", -1.0),
    ],
)
def test_out_of_range_fields_are_named(cls: type, field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}.*{value:g}"):
        cls(**{field: value})
