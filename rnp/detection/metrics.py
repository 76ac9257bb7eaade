"""Score detectors with what is known of the attack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from rnp.detection.base import RecoveredTrigger, SampleDetector, iou, iou_top_k
from rnp.detection.candidates import KnownAttack
from rnp.detection.run import Detection, Detectors, LabelScores, TriggersByModel
from rnp.training.predict import predict
from rnp.types import Images, ImageSet, Trigger


def detection_metrics(
    detection: Detection,
    attack: KnownAttack,
    detectors: Detectors,
    model: nn.Module,
    num_test_images: int,
) -> dict[str, object]:
    """Whether each detector is right about the backdoored `model`."""
    support = attack.trigger.support
    triggers = target_triggers(detection.triggers, attack.target)
    metrics: dict[str, object] = {
        "target_label": -1 if attack.target is None else attack.target,
        "triggers": {
            name: trigger_metrics(trigger, support, model, attack.tests, num_test_images)
            for name, trigger in triggers.items()
        },
        "labels": label_metrics(detection.labels, attack.target),
    }
    if detection.benign_labels is not None:
        metrics["benign_labels"] = label_metrics(detection.benign_labels, None)
    return metrics | sample_metrics(detection, detectors.samples, attack)


def label_metrics(label_scores: dict[str, LabelScores], target: int | None) -> dict[str, dict]:
    """The verdict of each detector, and whether it is the target label; -1 is no decision."""
    verdicts = {name: result.verdict for name, result in label_scores.items()}
    return {
        name: {
            "label": -1 if verdict.label is None else verdict.label,
            "margin": verdict.margin,
            "correct": verdict.label == target,
        }
        for name, verdict in verdicts.items()
    }


def target_triggers(triggers: TriggersByModel, target: int | None) -> dict[str, RecoveredTrigger]:
    """The trigger of the target label from each model; the smallest one for all-to-all attacks."""
    return {
        name: by_label[smallest(by_label) if target is None else target]
        for name, by_label in triggers.items()
    }


def smallest(triggers: list[RecoveredTrigger]) -> int:
    """The label with the smallest trigger."""
    return min(triggers, key=lambda trigger: trigger.l1).label


def trigger_metrics(
    trigger: RecoveredTrigger,
    support: Bool[Tensor, "h w"] | None,
    model: nn.Module,
    tests: ImageSet,
    n: int,
) -> dict[str, float]:
    """Size of a recovered trigger, its ASR on `model`, and its overlap with a true patch.

    The ASR counts the first `n` test images of other classes than the trigger's. `support` is
    None where the true trigger is no patch.
    """
    others = tests.subset((tests.labels != trigger.label).nonzero().squeeze(1)[:n])
    hits = predict(model, trigger.apply(others.as_floats())).argmax(1) == trigger.label
    metrics = {"l1": trigger.l1, "success": hits.float().mean().item(), "gain": trigger.gain}
    if support is not None:
        metrics["iou"] = iou(trigger.mask, support)
        metrics["iou_top_k"] = iou_top_k(trigger.mask, support)
    return metrics


def sample_metrics(
    detection: Detection, detectors: Sequence[SampleDetector], attack: KnownAttack
) -> dict[str, dict[str, dict]]:
    """How well each sample detector does, by task, and how well the training loss alone does."""
    metrics = {
        task: {
            detector.name: candidates.metrics(
                *detection.samples[task][detector.name], detector.needs_unlearned
            )
            for detector in detectors
        }
        for task, candidates in detection.candidates.items()
    }
    training = detection.candidates.get("training_samples")
    if training is not None and attack.losses is not None:
        scores = -attack.losses[training.positions]
        # The defender's images have no training loss: the clean candidates set the threshold.
        clean_scores = scores[~training.triggered]
        metrics["training_samples"]["training_loss"] = training.metrics(scores, clean_scores, False)
    return metrics


def roc_points(scores: Tensor, positives: Tensor) -> tuple:
    """False and true positive rates, and the area under their curve."""
    from sklearn.metrics import roc_auc_score, roc_curve

    fpr, tpr, _ = roc_curve(positives, scores)
    return fpr, tpr, roc_auc_score(positives, scores)


def roc_by_detector(detection: Detection) -> dict[str, tuple]:
    """The ROC of each sample detector among test images."""
    triggered = detection.candidates["samples"].triggered
    return {
        name: roc_points(result.scores, triggered)
        for name, result in detection.samples["samples"].items()
    }


def visible_trigger(trigger: Trigger, example: Images) -> tuple[Tensor, Tensor]:
    """A picture of a true trigger, and the pixels that it covers.

    A trigger over the whole image is shown by its change of `example`, around mid-gray.
    """
    if trigger.support is None:
        change = (trigger(example) - example)[0]
        return change / 2 + 0.5, torch.ones(example.shape[2:])
    return trigger(torch.zeros_like(example))[0], trigger.support.float()
