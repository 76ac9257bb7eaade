"""Run detectors on an untrusted model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Float
from torch import Tensor

from rnp.clock import Clock
from rnp.detection.base import (
    LabelDetector,
    LabelVerdict,
    RecoveredTrigger,
    SampleDetector,
    threshold,
)
from rnp.detection.run import (
    Detect,
    LabelScores,
    Models,
    recover_and_detect_labels,
    run_label_detectors,
    run_sample_detectors,
)
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.detection.unlearned import restore_checkpoint, unlearned_by_detector
from rnp.seeds import generator
from rnp.training.predict import predict
from rnp.unlearn import Unlearned
from rnp.untrusted.case import AuditCase
from rnp.untrusted.images import load_images_in_order

DEFAULTS = Detect()


def detection_models(case: AuditCase, unlearned: Unlearned) -> Models:
    """The given model, and the unlearned checkpoint that label detectors compare it with."""
    model = case.loaded.model
    checkpoint = restore_checkpoint(model, unlearned, DEFAULTS.trigger_checkpoint)
    return {"backdoored": model, "unlearned": checkpoint}


def recover_triggers(case: AuditCase, search: NeuralCleanse) -> list[RecoveredTrigger]:
    """The smallest trigger of each class in the given model, in order."""
    rng = generator(case.seed, "triggers/backdoored")
    return search.recover(case.loaded.model, case.defense.train, rng=rng)


def detect_labels(
    case: AuditCase,
    unlearned: Unlearned,
    detectors: Sequence[LabelDetector],
    triggers: list[RecoveredTrigger],
) -> dict[str, LabelScores]:
    """The scores of the labels, by each detector.

    Detectors that need triggers get those of the given model.
    """
    return run_label_detectors(
        detectors,
        detection_models(case, unlearned),
        {"backdoored": triggers},
        unlearned.trajectory,
        case.defense.train,
        case.seed,
        Clock(),
    )


def search_and_detect_labels(
    case: AuditCase,
    unlearned: Unlearned,
    detectors: Sequence[LabelDetector],
    search: NeuralCleanse,
) -> dict[str, LabelVerdict]:
    """The label by each detector, with triggers from the given and from the unlearned model.

    Nothing is recovered when no detector needs triggers.
    """
    label_scores = recover_and_detect_labels(
        search,
        detectors,
        detection_models(case, unlearned),
        unlearned.trajectory,
        case.defense.train,
        case.seed,
        Clock(),
    )
    return {name: scores.verdict for name, scores in label_scores.items()}


@dataclass(frozen=True)
class SuspectScores:
    """The scores of a sample detector, and the threshold above which an image is flagged.

    5 % of the clean images that the unlearning has not seen are above the threshold.
    """

    scores: Float[Tensor, "n"]
    threshold: float

    @property
    def flagged(self) -> Bool[Tensor, "n"]:
        return self.scores > self.threshold


@dataclass(frozen=True)
class Suspects:
    """Images that may carry a trigger, their predicted classes, and the scores by detector.

    `skipped` has a line for each file that was not read.
    """

    paths: list[Path]
    predicted: list[str]
    by_detector: dict[str, SuspectScores]
    skipped: list[str]

    def rows(self) -> list[dict[str, str]]:
        """One row per image, for a table."""
        rows = [
            {"path": str(path), "predicted": name} for path, name in zip(self.paths, self.predicted)
        ]
        for detector, results in self.by_detector.items():
            scores, flags = results.scores.tolist(), results.flagged.tolist()
            for row, score, is_flagged in zip(rows, scores, flags):
                row[detector] = f"{score:.6g}"
                row[f"{detector}_flagged"] = str(is_flagged).lower()
        return rows


def score_suspects(
    case: AuditCase, unlearned: Unlearned, detectors: Sequence[SampleDetector], source: str
) -> Suspects:
    """Score all images of a folder or a table; a high score is suspicious.

    Raises: UserError when there is no readable image.
    """
    model = case.loaded.model
    classes = case.classes
    size = case.defense.train.shape[1]
    paths, images, skipped = load_images_in_order(source, size=size)
    get_checkpoint = functools.partial(restore_checkpoint, model, unlearned)
    results = run_sample_detectors(
        "samples",
        detectors,
        model,
        images,
        case.defense,
        unlearned_by_detector(detectors, get_checkpoint, DEFAULTS.sample_checkpoint),
        case.seed,
        Clock(),
    )
    by_detector = {
        name: SuspectScores(result.scores, threshold(result.clean_scores))
        for name, result in results.items()
    }
    predicted = [classes[label] for label in predict(model, images).argmax(1).tolist()]
    return Suspects(paths, predicted, by_detector, skipped)
