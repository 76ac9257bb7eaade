"""All detectors in one run, in memory: what they receive, their keys and their metrics."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from planted import CLASSES, CORNER, TARGET, Planted, images, triggered

from rnp.attacks.base import AdditiveTrigger, BlendTrigger
from rnp.clock import Clock
from rnp.detection.base import LabelVerdict, RecoveredTrigger
from rnp.detection.candidates import KnownAttack
from rnp.detection.labels.consensus import Consensus
from rnp.detection.labels.neuron_noise import NeuronNoise
from rnp.detection.labels.prediction_drift import PredictionDrift
from rnp.detection.labels.trigger_survival import TriggerSurvival
from rnp.detection.metrics import (
    detection_metrics,
    label_metrics,
    roc_by_detector,
    target_triggers,
    trigger_metrics,
    visible_trigger,
)
from rnp.detection.run import (
    Detect,
    DetectorInput,
    LabelScores,
    run_detection,
    run_label_detectors,
    select_detectors,
)
from rnp.detection.samples.mean_unlearned_confidence import MeanUnlearnedConfidence
from rnp.detection.samples.strip import Strip
from rnp.detection.samples.unlearned_confidence import UnlearnedConfidence
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.errors import UserError
from rnp.seeds import generator
from rnp.types import DefenseSet, Epoch, ImageSet, PoisonedSet
from rnp.unlearn import Unlearn

PATCH = BlendTrigger(torch.ones(3, 8, 8), CORNER.float().unsqueeze(0))
METHODS = (
    NeuralCleanse(),
    PredictionDrift(),
    TriggerSurvival(),
    Strip(),
    UnlearnedConfidence(),
    MeanUnlearnedConfidence(),
)
OPTIONS = Detect(
    num_test_images=40,
    num_training_images=100,
    labels=("prediction_drift", "trigger_survival"),
    samples=("unlearned_confidence", "mean_unlearned_confidence", "strip"),
)


def drifting() -> Epoch:
    """A step of an unlearning at which all images are assigned to the target label."""
    shares = {f"share/{c}": float(c == TARGET) for c in range(CLASSES)}
    zeros = {"loss": 0.0, "learning_rate": 0.0, "gradient_norm": 0.0}
    return Epoch(epoch=0, step=0, accuracy=0.2, extra=shares, **zeros)


def given() -> DetectorInput:
    clean = DefenseSet(images(), images(seed=1))
    return DetectorInput(Planted(), lambda level: Planted(bias=4.0), [drifting()], clean)


def known_attack(losses: bool = True) -> KnownAttack:
    """The first 30 images of the pool are poisoned, and have the lowest training losses."""
    tests = images(120, seed=2)
    pool = images(200, seed=3)
    others = (tests.labels != TARGET).nonzero().squeeze(1)
    attacked = ImageSet(triggered(tests), tests.labels, tests.classes).subset(others)
    changes = PoisonedSet(
        torch.arange(30),
        triggered(pool)[:30],
        torch.full((30,), TARGET),
        torch.zeros(30, dtype=torch.bool),
        PATCH,
    )
    early = torch.arange(200.0) / 200
    return KnownAttack(TARGET, PATCH, tests, attacked, pool, changes, early if losses else None)


def test_a_planted_backdoor_is_detected():
    attack = known_attack()
    selected = select_detectors(OPTIONS, METHODS)
    detection = run_detection(given(), attack, selected, OPTIONS, seed=0)
    metrics = detection_metrics(detection, attack, selected, Planted(), 40)
    assert list(metrics) == ["target_label", "triggers", "labels", "samples", "training_samples"]
    assert metrics["target_label"] == TARGET
    assert set(metrics["triggers"]) == {"backdoored", "unlearned"}
    assert metrics["triggers"]["backdoored"]["iou"] == 1.0
    assert set(metrics["labels"]) == {"prediction_drift", "trigger_survival"}
    assert metrics["labels"]["prediction_drift"]["correct"]
    assert list(metrics["samples"]) == list(OPTIONS.samples)
    assert metrics["samples"]["strip"]["auroc"] > 0.95
    assert not metrics["samples"]["strip"]["needs_unlearned"]
    assert metrics["samples"]["unlearned_confidence"]["needs_unlearned"]
    assert metrics["training_samples"]["training_loss"]["auroc"] == 1.0
    assert detection.skipped == []
    assert set(roc_by_detector(detection)) == set(OPTIONS.samples)
    assert list(detection.seconds) == [
        "triggers_backdoored",
        "triggers_unlearned",
        "labels_prediction_drift",
        "labels_trigger_survival",
        *(f"samples_{name}" for name in OPTIONS.samples),
        *(f"training_samples_{name}" for name in OPTIONS.samples),
    ]


def test_labels_predicted_for_the_benign_model_are_false_alarms():
    options = dataclasses.replace(
        OPTIONS, labels=("prediction_drift",), samples=("strip",), num_training_images=0
    )
    attack = known_attack(losses=False)
    selected = select_detectors(options, METHODS)
    unlearn = Unlearn(lr=1.0, epochs=5, max_drop_per_step=0)
    benign = Planted(corner=0.0)
    detection = run_detection(
        given(), attack, selected, options, seed=0, benign=benign, unlearn=unlearn
    )
    metrics = detection_metrics(detection, attack, selected, Planted(), 40)
    assert "training_samples" not in metrics
    verdict = metrics["benign_labels"]["prediction_drift"]
    assert verdict["correct"] == (verdict["label"] == -1)
    assert {"benign_unlearn", "benign_labels_prediction_drift"} <= set(detection.seconds)


def test_which_detectors_run_on_which_models():
    """Those that unlearn by themselves run on the given model, others on the unlearned one too."""
    models = {"backdoored": Planted(), "unlearned": Planted(bias=4.0)}
    detectors = [PredictionDrift(), TriggerSurvival()]
    label_scores = run_label_detectors(
        detectors, models, {}, [drifting()], images(), seed=0, clock=Clock()
    )
    assert list(label_scores) == ["prediction_drift"], "there are no triggers"


@pytest.mark.parametrize(
    "cls, stream, keys",
    [
        (NeuronNoise, "labels/neuron_noise", ["neuron_noise", "neuron_noise_unlearned"]),
        (Consensus, "labels/agreement", ["consensus"]),  # its name when results were made
    ],
)
def test_every_detector_has_its_own_draws(cls, stream, keys, monkeypatch):
    seeds = []

    def score_evidence(self, evidence, clean, *, rng):
        seeds.append(rng.initial_seed())
        return torch.zeros(CLASSES)

    monkeypatch.setattr(cls, "score_evidence", score_evidence)
    models = {"backdoored": Planted(), "unlearned": Planted()}
    label_scores = run_label_detectors([cls()], models, {}, [], images(), seed=7, clock=Clock())
    assert list(label_scores) == keys
    assert seeds == [generator(7, stream).initial_seed()] * len(keys)


@pytest.mark.parametrize("target, correct", [(1, [True, False]), (None, [False, True])])
def test_label_metrics(target, correct):
    detector = PredictionDrift(min_score=0.5, min_margin=0.2)
    label_scores = {
        "sure": LabelScores(detector, torch.tensor([0.0, 0.75, 0.25])),
        "unsure": LabelScores(detector, torch.tensor([0.25, 0.375, 0.25])),
    }
    assert label_scores["sure"].verdict == LabelVerdict(1, 0.5)
    assert label_metrics(label_scores, target) == {
        "sure": {"label": 1, "margin": 0.5, "correct": correct[0]},
        "unsure": {"label": -1, "margin": 0.125, "correct": correct[1]},
    }


def test_an_all_to_all_attack_shows_the_smallest_trigger():
    triggers = [
        RecoveredTrigger(label, torch.full((8, 8), size), torch.ones(3, 8, 8), 1.0, 0.0)
        for label, size in enumerate((0.5, 0.25, 0.75))
    ]
    assert target_triggers({"backdoored": triggers}, None)["backdoored"].label == 1
    assert target_triggers({"backdoored": triggers}, 2)["backdoored"].label == 2


@pytest.mark.parametrize("support", [CORNER, None])
def test_metrics_of_the_true_trigger(support):
    trigger = RecoveredTrigger(TARGET, CORNER.float(), torch.ones(3, 8, 8), 0.9, 0.2)
    metrics = trigger_metrics(trigger, support, Planted(), images(seed=1), n=12)
    overlap = {} if support is None else {"iou": 1.0, "iou_top_k": 1.0}
    assert metrics == pytest.approx({"l1": 4.0, "success": 1.0, "gain": 0.875, **overlap})


def test_a_patch_is_shown_alone_and_other_triggers_by_their_change():
    example = torch.full((1, 3, 8, 8), 0.5)
    picture, mask = visible_trigger(PATCH, example)
    assert picture.eq(CORNER).all()
    assert mask.eq(CORNER).all()
    picture, mask = visible_trigger(AdditiveTrigger(torch.full((3, 8, 8), 0.25)), example)
    assert picture.eq(0.625).all()
    assert mask.eq(1).all()


@pytest.mark.parametrize("family", ["labels", "samples"])
def test_unknown_detectors_are_refused(family):
    with pytest.raises(UserError, match=f"detect.{family}: unknown detector 'strop'"):
        Detect(**{family: ("strop",)})
    with pytest.raises(UserError, match=f"detect.{family} must name at least one"):
        Detect(**{family: ()})


def test_too_few_test_images_are_refused():
    with pytest.raises(UserError, match=r"detect\.num_test_images must be at least 10, got 9"):
        Detect(num_test_images=9)
