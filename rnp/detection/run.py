"""Run detectors and score them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import click
import torch
from annotated_types import Ge, MinLen
from torch import Tensor, nn

from rnp.clock import Clock
from rnp.detection.base import (
    Evidence,
    LabelDetector,
    LabelVerdict,
    RecoveredTrigger,
    SampleDetector,
    TriggerRecovery,
    iou,
    iou_top_k,
)
from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters
from rnp.registry import Method, load, names, suggest
from rnp.seeds import generator
from rnp.training.predict import predict
from rnp.types import Bytes, DefenseSet, Epoch, ImageSet
from rnp.unlearn import Unlearn


def score_candidates(
    detector: SampleDetector,
    victim: nn.Module,
    images: Bytes,
    clean: DefenseSet,
    weak: nn.Module,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Scores of the screened images and of the defender's own, which set the threshold."""
    return tuple(
        detector.score(
            victim,
            each,
            clean.train,
            rng=generator(seed, f"samples/{detector.name}"),
            unlearned=weak,
        )
        for each in (images, clean.val.images)
    )


def roc_points(scores: Tensor, positives: Tensor) -> tuple:
    from sklearn.metrics import roc_auc_score, roc_curve

    fpr, tpr, _ = roc_curve(positives, scores)
    return fpr, tpr, roc_auc_score(positives, scores)


@dataclass(frozen=True, kw_only=True)
class Detect(Hyperparameters):
    section: ClassVar[str] = "detect"

    num_test_images: Annotated[
        int,
        Ge(10),
        "clean test images, and as many triggered ones, among which the latter are to be found",
    ] = 500
    num_training_images: Annotated[
        int, "images of the poisoned training set among which to find the poisoned ones; 0: none"
    ] = 2000
    trigger_checkpoint: Annotated[
        Literal["0.8", "0.5", "0.2"],
        "unlearned checkpoint, by its accuracy, to recover triggers from",
    ] = "0.5"
    sample_checkpoint: Annotated[
        Literal["0.8", "0.5", "0.2"], "unlearned checkpoint, by its accuracy, to find samples with"
    ] = "0.2"
    include_benign: Annotated[
        bool,
        "unlearn the benign model too, and ask the detectors of the label for their false alarms",
    ] = False
    labels: Annotated[tuple[str, ...], MinLen(1), "detectors of the label to ask"] = (
        "prediction_drift",
        "trigger_survival",
        "consensus",
        "neural_cleanse_index",
        "mm_bd",
    )
    samples: Annotated[tuple[str, ...], MinLen(1), "detectors of triggered images to ask"] = (
        "unlearned_confidence",
        "unlearned_mahalanobis",
        "mahalanobis",
        "strip",
        "badexpert",
        "spectral_signatures",
        "activation_clustering",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_training_images and self.num_training_images < 100:
            raise UserError(
                f"detect.num_training_images must be 0 or at least 100, got {self.num_training_images}"
            )
        for family in ("labels", "samples"):
            for name in getattr(self, family):
                if name not in names(family):
                    raise UserError(
                        f"detect.{family}: unknown detector {name!r}{suggest(name, names(family))}"
                    )


def detectors() -> list[tuple[type[Method], str]]:
    """Every detector, with the prefix of its options."""
    return [
        (load(family, name), f"{name}.")
        for family in ("triggers", "labels", "samples")
        for name in names(family)
    ]


def recover_triggers(
    search: TriggerRecovery, nets: dict[str, nn.Module], clean: ImageSet, seed: int, clock: Clock
) -> dict[str, list[RecoveredTrigger]]:
    """The triggers of all labels, by the name of the model that they are recovered from."""
    found = {}
    for name, net in nets.items():
        with clock(f"triggers_{name}"):
            found[name] = search.recover(net, clean, rng=generator(seed, f"triggers/{name}"))
    return found


@dataclass(frozen=True)
class LabelScores:
    """What `detector` gave each class."""

    detector: LabelDetector
    scores: Tensor  # float [k]

    @property
    def verdict(self) -> LabelVerdict:
        return self.detector.verdict(self.scores)


def run_label_detectors(
    detectors: list[LabelDetector],
    nets: dict[str, nn.Module],
    found: dict[str, list[RecoveredTrigger]],
    trajectory: list[Epoch],
    clean: ImageSet,
    seed: int,
    clock: Clock,
) -> dict[str, LabelScores]:
    """What each detector says of each model; those that judge by triggers are asked of the models
    that `found` has triggers of.
    """
    said = {}
    for detector in detectors:
        if len(clean.classes) < detector.min_classes:
            click.echo(
                f"warning: {detector.name} needs {detector.min_classes} classes and was not asked",
                err=True,
            )
            continue
        for name, net in nets.items():
            if (detector.needs_unlearned and name != "backdoored") or (
                detector.needs_triggers and name not in found
            ):
                continue
            with clock(f"labels_{detector_key(detector.name, name)}"):
                evidence = Evidence(net, found.get(name, []), nets["unlearned"], trajectory)
                scores = detector.score_evidence(
                    evidence, clean, rng=generator(seed, f"labels/{detector.name}")
                )
            said[detector_key(detector.name, name)] = LabelScores(detector, scores)
    return said


def detector_key(detector: str, net: str) -> str:
    return detector if net == "backdoored" else f"{detector}_{net}"


def unlearn_and_detect_labels(
    model: nn.Module,
    unlearn: Unlearn,
    ask_for: dict[str, Method],
    options: Detect,
    clean: ImageSet,
    seed: int,
    clock: Clock,
) -> dict[str, LabelScores]:
    """What the detectors of the label say of a model that has not been unlearned yet, and of its
    unlearned copy.
    """
    with clock("unlearn"):
        unlearned = unlearn(model, clean, rng=generator(seed, "unlearn"))
    weak = copy.deepcopy(model)
    weak.load_state_dict(
        unlearned.checkpoints.get(options.trigger_checkpoint, unlearned.checkpoints["end"])
    )
    nets = {"backdoored": model, "unlearned": weak.eval()}
    return recover_and_detect_labels(
        ask_for["neural_cleanse"],
        [ask_for[name] for name in options.labels],
        nets,
        unlearned.trajectory,
        clean,
        seed,
        clock,
    )


def recover_and_detect_labels(
    search: TriggerRecovery,
    detectors: list[LabelDetector],
    nets: dict[str, nn.Module],
    trajectory: list[Epoch],
    clean: ImageSet,
    seed: int,
    clock: Clock,
) -> dict[str, LabelScores]:
    """The same where triggers have not been recovered yet; they are when a detector asks for
    them.
    """
    found = (
        recover_triggers(search, nets, clean, seed, clock)
        if any(each.needs_triggers for each in detectors)
        else {}
    )
    return run_label_detectors(detectors, nets, found, trajectory, clean, seed, clock)


def label_metrics(said: dict[str, LabelScores], target: int | None) -> dict[str, dict]:
    verdicts = {name: each.verdict for name, each in said.items()}
    return {
        name: {
            "label": -1 if verdict.label is None else verdict.label,
            "margin": verdict.margin,
            "correct": verdict.label == target,
        }
        for name, verdict in verdicts.items()
    }


def smallest(triggers: list[RecoveredTrigger]) -> int:
    """The label with the smallest trigger: all-to-all backdoors have no other one to show."""
    return min(triggers, key=lambda trigger: trigger.l1).label


def run_sample_detectors(
    task: str,
    screens: list[SampleDetector],
    victim: nn.Module,
    images: Bytes,
    clean: DefenseSet,
    weak: dict[str, nn.Module],
    seed: int,
    clock: Clock,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What `score_candidates` gets from each detector, by its name."""
    answers = {}
    for each in screens:
        with clock(f"{task}_{each.name}"):
            answers[each.name] = score_candidates(
                each, victim, images, clean, weak[each.name], seed
            )
    return answers


def trigger_scores(
    trigger: RecoveredTrigger,
    support: torch.Tensor | None,
    victim: nn.Module,
    tests: ImageSet,
    n: int,
) -> dict[str, float]:
    """Size of a recovered trigger, its ASR on the backdoored model, and its overlap with the true
    one if that is a patch.

    The ASR counts the first `n` test images of the classes that are not the trigger's.
    """
    others = tests.subset((tests.labels != trigger.label).nonzero().squeeze(1)[:n])
    hits = predict(victim, trigger.apply(others.as_floats())).argmax(1) == trigger.label
    scores = {"l1": trigger.l1, "success": hits.float().mean().item(), "gain": trigger.gain}
    if support is not None:
        scores |= {"iou": iou(trigger.mask, support), "iou_top_k": iou_top_k(trigger.mask, support)}
    return scores
