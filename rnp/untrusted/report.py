"""The result of an audit: everything that was measured about an untrusted model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from rnp.defenses.rnp_rebuild import RNPRebuild
from rnp.detection.base import LabelVerdict, RecoveredTrigger
from rnp.detection.triggers.neural_cleanse import QUICK, NeuralCleanse
from rnp.evaluation.metrics import Proportion, paired_interval
from rnp.models.classifier import Classifier
from rnp.params.ranges import Hyperparameters
from rnp.prune import Prune, Pruned
from rnp.rebuild import REBUILDABLE, Rebuild
from rnp.recover import Recover, Recovered
from rnp.training.work import Work
from rnp.unlearn import GROWING, Unlearn, Unlearned
from rnp.untrusted.false_alarms import false_alarms
from rnp.untrusted.model import LoadedModel
from rnp.untrusted.spec import ModelSpec

NOT_TESTED = (
    "Any trigger: none was given, so whether the model carried a backdoor, and whether it still"
    " does, is not measured.",
    "Attackers who know this defense and train against it.",
    "Images of another distribution than those given.",
    "Variation between repairs: this is one run with one seed.",
)
HINT = "a benign model also drifts to some class: a label detected here is a hint, not a proof"
MAX_SKIPPED = 1000
"""Skipped files that a report names at most."""


@dataclass(frozen=True, kw_only=True)
class AuditSettings(Hyperparameters):
    """The methods that examine a model."""

    unlearn: Unlearn = GROWING
    search: NeuralCleanse = QUICK


@dataclass(frozen=True, kw_only=True)
class RepairSettings(AuditSettings):
    """The methods that examine and repair a model."""

    section: ClassVar[str] = "purify"

    recover: Recover = Recover()
    prune: Prune = REBUILDABLE
    rebuild: Rebuild = Rebuild()
    tuning_rounds: Annotated[
        int,
        Ge(0),
        "largest number of rounds of looking for triggers that still work, and rebuilding against"
        " them",
    ] = RNPRebuild().tuning_rounds


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A checkpoint and the network that its weights fit."""

    architecture: str
    num_classes: int
    tensors: int
    values: int
    key: str
    """Where the file has the weights, empty if they are the whole file."""
    prefix: str
    """Removed from the names of all tensors."""
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    read_as: str
    """How the file was read, and in which isolation."""
    memory_layout: str


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """The clean images; methods optimize on `train_images` of them and choose with all."""

    source: str
    train_images: int
    all_images: int
    labeled: bool
    skipped: tuple[str, ...]
    """A line for each file that was not used."""


@dataclass(frozen=True, kw_only=True)
class HeldOutCost:
    """The accuracy that a repair costs, on `n` images that had no part in it."""

    turned_wrong: int
    turned_right: int
    n: int

    @property
    def value(self) -> float:
        return (self.turned_wrong - self.turned_right) / self.n

    def interval(self) -> tuple[float, float]:
        return paired_interval(self.turned_wrong, self.turned_right, self.n)


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A repaired model, and the results that led to it.

    `accuracy` is on all clean images, with which the neurons were chosen; `recovered_accuracy` is
    that of the recovered model on the images that the masks were optimized on. `rule` is the one
    that chose the neurons. The model was rebuilt against `triggers_before`, which were recovered
    from the given model; `triggers_after` are those of the same labels in the repaired model.
    """

    model: Classifier
    recovered: Recovered
    recovered_accuracy: float
    pruned: Pruned
    rule: str
    accuracy: Proportion
    cost: HeldOutCost
    triggers_before: tuple[RecoveredTrigger, ...]
    triggers_after: tuple[RecoveredTrigger, ...]

    @property
    def tuned_labels(self) -> tuple[int, ...]:
        """The classes against whose triggers the model was rebuilt."""
        return tuple(trigger.label for trigger in self.triggers_before)


@dataclass(frozen=True, kw_only=True)
class AuditReport:
    """What is known about an untrusted model after an audit; `repair` is None after `inspect`.

    `accuracy` is that of the given model on the clean images. `labels` has the verdict of each
    label detector; those that the repair follows come first. `triggers` has the smallest trigger
    that was found for each class, in order.
    """

    path: str
    loaded: LoadedModel
    model: ModelFacts
    images: ImageFacts
    classes: tuple[str, ...]
    accuracy: Proportion
    unlearned: Unlearned
    triggers: tuple[RecoveredTrigger, ...]
    labels: dict[str, LabelVerdict]
    repair: Repair | None
    warnings: tuple[str, ...]
    not_tested: tuple[str, ...] = NOT_TESTED
    spec: ModelSpec
    settings: AuditSettings
    seed: int
    work: dict[str, Work]
    """What each step computed: `unlearn`, `detect` and, after a repair, `repair`."""
    seconds: float

    @property
    def suspected_trigger(self) -> RecoveredTrigger:
        """That of the first label that a detector reports, else the smallest one."""
        reported = [verdict.label for verdict in self.labels.values() if verdict.label is not None]
        if reported:
            return self.triggers[reported[0]]
        return min(self.triggers, key=lambda trigger: trigger.effective_size)

    def to_dict(self) -> dict[str, Any]:
        """The numbers and texts of the report, for JSON."""
        images = dataclasses.asdict(self.images)
        skipped = images.pop("skipped")
        return {
            "seed": self.seed,
            "seconds": self.seconds,
            "work": {step: dataclasses.asdict(work) for step, work in self.work.items()},
            "warnings": list(self.warnings),
            "not_tested": list(self.not_tested),
            "inputs": {self.path: self.loaded.converted.input_sha256},
            "model": dataclasses.asdict(self.model),
            "images": images | {"skipped": len(skipped)},
            "skipped": list(skipped[:MAX_SKIPPED]),
            "classes": dict(enumerate(self.classes)),
            "accuracy_before": describe_proportion(self.accuracy),
            **describe_detection(self),
            "unlearn": self.unlearned.metrics(),
            "settings": {"model": dataclasses.asdict(self.spec)}
            | dataclasses.asdict(self.settings),
            **(describe_repair(self.repair, self.classes) if self.repair else {}),
        }


def describe_proportion(proportion: Proportion) -> dict[str, object]:
    return {
        "value": proportion.value,
        "n": proportion.n,
        "interval": list(proportion.interval()),
    }


def describe_detection(report: AuditReport) -> dict[str, dict]:
    """The verdicts (label -1: no decision), and the trigger that is suspected most."""
    labels = {
        name: {
            "label": -1 if verdict.label is None else verdict.label,
            "margin": verdict.margin,
            "class": "" if verdict.label is None else report.classes[verdict.label],
            "false_alarms": false_alarms(name),
        }
        for name, verdict in report.labels.items()
    }
    trigger = report.suspected_trigger
    size = {"l1": trigger.l1, "success": trigger.success, "gain": trigger.gain}
    return {"labels": labels, "triggers": {f"class {report.classes[trigger.label]}": size}}


def describe_repair(repair: Repair, classes: tuple[str, ...]) -> dict[str, object]:
    cost = repair.cost
    return {
        "recover": {"accuracy": repair.recovered_accuracy} | repair.recovered.metrics(),
        "prune": repair.pruned.metrics(repair.rule, repair.recovered.mask),
        "accuracy_after": describe_proportion(repair.accuracy),
        "cost": dataclasses.asdict(cost) | {"value": cost.value, "interval": list(cost.interval())},
        "tuned_against": [classes[label] for label in repair.tuned_labels],
        "trigger_sizes": {
            classes[before.label]: {"before": before.effective_size, "after": after.effective_size}
            for before, after in zip(repair.triggers_before, repair.triggers_after)
        },
    }


def summarize(report: AuditReport) -> list[str]:
    """The report in a few lines, for the terminal."""
    lines = [
        f"{report.model.architecture}, {report.model.num_classes} outputs; accuracy on"
        f" {report.accuracy.n} of your images: {report.accuracy.value:.3f}"
    ]
    lines += [
        f"label by {name}: {describe_verdict(name, verdict, report.classes)}"
        for name, verdict in report.labels.items()
    ]
    lines.append(HINT)
    if report.repair:
        lines.append(summarize_repair(report.repair, report.classes))
    steps = "; ".join(f"{step} {work}" for step, work in report.work.items())
    return [*lines, f"passes of an image through the network: {steps}"]


def describe_verdict(detector: str, verdict: LabelVerdict, classes: tuple[str, ...]) -> str:
    label = verdict.label
    decision = "no decision" if label is None else f"class {label} ({classes[label]})"
    counted = false_alarms(detector)
    error = f" (false alarms when tested: {counted})" if counted else ""
    return f"{decision}, margin {verdict.margin:.2f}{error}"


def summarize_repair(repair: Repair, classes: tuple[str, ...]) -> str:
    neurons = sum(len(values) for values in repair.recovered.mask.values())
    names = ", ".join(classes[label] for label in repair.tuned_labels)
    tuning = f", then rebuilt against triggers of {names}" if names else ""
    low, high = repair.cost.interval()
    sizes = "".join(
        f"; smallest trigger of {classes[before.label]} {before.effective_size:.0f} pixels before,"
        f" {after.effective_size:.0f} after"
        for before, after in zip(repair.triggers_before, repair.triggers_after)
    )
    return (
        f"pruned {repair.pruned.chosen.pruned} of {neurons} neurons{tuning}; accuracy on images"
        f" that had no part in the repair {-repair.cost.value:+.3f} (95 % interval {-high:+.3f} to"
        f" {-low:+.3f}, {repair.cost.n} images){sizes}"
    )
