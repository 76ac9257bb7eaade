from __future__ import annotations

import dataclasses
import math

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
    outlier_p_value,
)
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.mm_bd import MMBD
from rnp.detection.labels.neural_cleanse_index import NeuralCleanseIndex
from rnp.detection.labels.neuron_noise import NeuronNoise
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.labels.trigger_size import TriggerSize
from rnp.detection.labels.trigger_survival import TriggerSurvival
from rnp.errors import UserError
from rnp.types import Epoch


def row(accuracy: float, *shares: float) -> Epoch:
    extra = {f"share/{c}": share for c, share in enumerate(shares)}
    zeros = {"loss": 0.0, "learning_rate": 0.0, "gradient_norm": 0.0}
    return Epoch(epoch=0, step=0, accuracy=accuracy, extra=extra, **zeros)


def sized(*sizes: int, baseline: float = 0.0, side: int = 8) -> list[RecoveredTrigger]:
    """One trigger per class whose mask covers that many pixels of an image of so many by so many.

    `baseline` is that of the smallest.
    """
    triggers = []
    for label, size in enumerate(sizes):
        mask = (torch.arange(side**2) < size).float().view(side, side)
        own_baseline = baseline if size == min(sizes) else 0.0
        pattern = torch.zeros(3, side, side)
        triggers.append(RecoveredTrigger(label, mask, pattern, 1.0, own_baseline))
    return triggers


def test_images_of_a_class_do_not_count_for_it() -> None:
    assert PredictionDrift().score(Planted(), images(), rng=rng()).tolist() == [0.0] * CLASSES


def test_the_label_of_a_collapsed_model_has_all_shares() -> None:
    detector = PredictionDrift()
    scores = detector.score(Planted(bias=50.0), images(), rng=rng())
    assert scores.tolist() == [float(c == TARGET) for c in range(CLASSES)]
    assert detector.verdict(scores) == LabelVerdict(TARGET, 1.0)


def test_the_collapse_weighs_most_in_a_trajectory() -> None:
    start = [row(0.9, 0.0, 0.1, 0.0)] * 50
    middle = [row(0.5, 0.1, 0.4, 0.1)] * 5
    collapse = [row(0.1, 0.0, 0.0, 0.9)] * 5
    rows = start + middle + collapse
    scores = PredictionDrift().from_trajectory(rows, 3)
    assert PredictionDrift().verdict(scores).label == 2
    first = 0.1**4 * 50
    second = 0.5**4 * 5
    third = 0.9**4 * 5
    expected = torch.tensor([0.1 * second, 0.1 * first + 0.4 * second, 0.1 * second + 0.9 * third])
    assert torch.allclose(scores, expected / (first + second + third), atol=1e-5)


@pytest.mark.parametrize("rows", [[row(1.0, 0.0, 0.0)], []], ids=["stayed", "took every step back"])
def test_no_label_is_predicted_for_an_accuracy_that_never_fell(rows) -> None:
    scores = PredictionDrift().from_trajectory(rows, 2)
    assert scores.shape == (2,) and PredictionDrift().verdict(scores) == LabelVerdict(None, 0.0)


@pytest.mark.parametrize(
    "scores, label",
    [
        ([0.1, 0.8, 0.1], 1),
        ([0.0, 0.45, 0.0], None),  # a small share
        ([0.55, 0.0, 0.45], None),  # a small margin
    ],
)
def test_a_share_must_be_large_and_in_lead(scores: list[float], label: int | None) -> None:
    assert PredictionDrift().verdict(torch.tensor(scores)).label == label


def test_the_index_predicts_the_planted_label() -> None:
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


@pytest.mark.parametrize(
    "sizes, label",
    [
        ((20, 21, 4, 19, 22), 2),
        ((20, 21, 4, 5, 22), None),  # two that are equally small
        ((20, 20, 16, 20, 20), None),  # not small enough
        ((10, 40, 5, 20, 80), None),  # sizes that differ so much do so by chance
        ((20, 40, 5, 70, 30), 2),  # so do these, but it leads by far
        ((20, 21, 60, 19, 22), None),
    ],
)
def test_the_smallest_trigger_must_lead(sizes: tuple[int, ...], label: int | None) -> None:
    detector = TriggerSize()
    assert detector.verdict(detector.from_triggers(sized(*sizes))).label == label


@pytest.mark.parametrize(
    "sizes, label",
    [
        ((5, 300), 0),
        ((300, 90, 5), 2),
        ((300, 90, 19), None),  # as small as those of benign models
        ((5, 90, 6), None),  # two that are equally small
    ],
)
def test_with_few_classes_the_smallest_trigger_is_compared_with_the_image(
    sizes: tuple[int, ...], label: int | None
) -> None:
    detector = TriggerSize()
    assert detector.verdict(detector.from_triggers(sized(*sizes, side=32))).label == label


@pytest.mark.parametrize("k", [4, 10, 43])
def test_the_chance_of_a_high_score(k: int) -> None:
    """For k = 4 in closed form: with two degrees of freedom the tail of Student's distribution is
    (1 - t / sqrt(2 + t^2)) / 2. For all k, among normal scores, 2 % are below 0.02.
    """
    p_value = outlier_p_value(torch.tensor([9.0, 1.0, 3.0, 2.0]))
    t = (9 - 2) / math.sqrt(1 + 1 / 3)
    assert p_value == pytest.approx(4 * (1 - t / math.sqrt(2 + t * t)) / 2)
    draws = torch.randn(1000, k, generator=rng())
    share = sum(outlier_p_value(scores) <= 0.02 for scores in draws) / len(draws)
    assert 0.01 <= share <= 0.03


def test_one_score_among_equal_ones_is_no_chance() -> None:
    assert outlier_p_value(torch.tensor([0.0, 1.0, 0.0, 0.0])) < 1e-6
    assert outlier_p_value(torch.zeros(5)) == 1


def test_sizes_in_closed_form() -> None:
    scores = TriggerSize().from_triggers(sized(20, 40, 5, 20))
    assert scores.tolist() == pytest.approx([0.0, -math.log(2), math.log(4), 0.0], abs=1e-6)
    assert TriggerSize().verdict(scores).margin == pytest.approx(math.log(4), abs=1e-6)


def test_the_size_names_the_planted_label() -> None:
    detector = TriggerSize()
    assert detector.verdict(detector.score(Planted(), images(), rng=rng())).label == TARGET


def test_a_label_with_a_high_baseline_is_not_flagged() -> None:
    detector = NeuralCleanseIndex()
    scores = detector.from_triggers(sized(20, 21, 1, 19, 22, baseline=1.0))
    assert detector.verdict(scores).label is None


class Forgetful(Planted):
    """The planted model with unlearned rows: every image is class 0 unless it has the trigger."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.where(CORNER, x, 0.0)) + 0.1 * torch.eye(CLASSES)[0]


def row_triggers(corner: float, sizes: dict[int, float]) -> list[RecoveredTrigger]:
    """Rows of pixels as triggers with masks of these `sizes`, and the corner for the target."""
    masks = {
        c: (torch.arange(64).view(8, 8) // 8 == c).float() * size / 8 for c, size in sizes.items()
    }
    masks[TARGET] = CORNER * corner
    return [RecoveredTrigger(c, masks[c], torch.ones(3, 8, 8), 1.0, 0.0) for c in range(CLASSES)]


def test_only_an_abnormally_small_trigger_counts() -> None:
    """Rows work in the planted model and not in the unlearned one, but the corner works in both.

    The corner has four pixels, the rows 1 to 6.
    """
    triggers = row_triggers(1.0, {0: 1, 1: 2, 2: 3, 4: 5, 5: 6})
    assert anomaly_index(torch.tensor([1.0, 2, 3, 4, 5, 6]).log())[TARGET] < 0
    scores = TriggerSurvival().from_triggers(triggers, Forgetful(), images())
    assert scores.tolist() == [0.0] * CLASSES


def test_the_trigger_of_a_backdoor_survives() -> None:
    """Class 0 takes every image without a trigger too."""
    triggers = row_triggers(0.9, {0: 30, 1: 31, 2: 32, 4: 33, 5: 34})
    scores = TriggerSurvival().from_triggers(triggers, Forgetful(), images())
    index = anomaly_index(torch.tensor([30, 31, 32, 3.6, 33, 34]).log())
    expected = [float(index[c]) * (c == TARGET) for c in range(CLASSES)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-4)
    assert TriggerSurvival().verdict(scores).label == TARGET


def test_each_detector_uses_its_part_of_the_evidence() -> None:
    triggers = sized(20, 21, 4, 19, 22, 20)
    rows = [row(0.1, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0)]
    evidence = Evidence(Planted(), triggers, Forgetful(), rows)
    margins = MMBD(starts=1, steps=2)
    survival = TriggerSurvival()
    expected = {
        PredictionDrift(): PredictionDrift().from_trajectory(rows, CLASSES),
        NeuralCleanseIndex(): NeuralCleanseIndex().from_triggers(triggers),
        survival: survival.from_triggers(triggers, Forgetful(), images()),
        margins: margins.score(Planted(), images(), rng=rng()),
    }
    for detector, scores in expected.items():
        assert torch.equal(detector.score_evidence(evidence, images(), rng=rng()), scores)


def with_scores(detector: LabelDetector, scores: tuple[float, ...]) -> LabelDetector:
    """The same detector with these scores for the unlearned copy."""

    class Fixed(type(detector)):
        def score(self, model, clean, *, rng):
            assert isinstance(model, Forgetful)
            return torch.tensor(scores)

    return Fixed(
        **{field.name: getattr(detector, field.name) for field in dataclasses.fields(detector)}
    )


@pytest.mark.parametrize(
    "margins, noise, scores, label",
    [
        ((0.0, 8.0, 4.0), (0.1, 0.8, 0.3), (0.0, 1.6, 0.0), 1),
        ((0.0, 8.0, 7.9), (0.1, 0.3, 0.6), (0.0, 0.0, 0.0), None),  # each predicts another one
        ((0.0, 8.0, 4.0), (0.1, 0.4, 0.1), (0.0, 0.8, 0.0), None),  # one score is too low
        ((0.0, 8.0, 4.0), (0.1, 0.6, 0.5), (0.0, 0.0, 0.0), None),  # or in too small a lead
    ],
)
def test_two_detectors_must_agree(margins, noise, scores, label) -> None:
    detector = Consensus(
        margins=with_scores(MMBD(min_score=4.0), margins),
        noise=with_scores(NeuronNoise(min_score=0.5, min_margin=0.2), noise),
    )
    evidence = Evidence(Planted(), [], Forgetful(), [])
    result = detector.score_evidence(evidence, images(), rng=rng())
    assert result.tolist() == pytest.approx(scores)
    assert detector.verdict(result).label == label


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


@pytest.mark.parametrize("name", ["margins", "noise"])
def test_the_scores_of_both_detectors_need_a_divisor(name: str) -> None:
    part = {"margins": MMBD(min_score=0.0), "noise": NeuronNoise(min_score=0.0)}[name]
    with pytest.raises(UserError, match=f"consensus.{name}.min_score must be above 0, got 0"):
        Consensus(**{name: part})
