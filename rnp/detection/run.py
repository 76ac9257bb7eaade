"""Run detectors of triggers, labels and samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge, MinLen
from jaxtyping import Float
from torch import Tensor, nn

from rnp.clock import Clock
from rnp.detection.base import (
    Evidence,
    LabelDetector,
    LabelVerdict,
    RecoveredTrigger,
    SampleDetector,
    TriggerRecovery,
)
from rnp.detection.candidates import Candidates, KnownAttack, select_candidates
from rnp.detection.unlearned import GetCheckpoint, restore_checkpoint, unlearned_by_detector
from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters
from rnp.registry import Method, load, names, suggest
from rnp.seeds import generator
from rnp.types import Bytes, DefenseSet, Epoch, ImageSet
from rnp.unlearn import Unlearn

Models = dict[str, nn.Module]
"""`backdoored` is the given model, `unlearned` the same one after unlearning."""
TriggersByModel = dict[str, list[RecoveredTrigger]]
"""The triggers of all labels, by the name of the model that they were recovered from."""
SEED_NAMES = {"consensus": "agreement"}
"""Former names of detectors: the generators keep them, so that results remain the same."""


@dataclass(frozen=True, kw_only=True)
class Detect(Hyperparameters):
    """Which detectors run, and on what."""

    section: ClassVar[str] = "detect"

    num_test_images: Annotated[
        int, Ge(10), "clean test images, and as many triggered ones, that sample detectors score"
    ] = 500
    num_training_images: Annotated[
        int, "images of the poisoned training set that sample detectors score; 0: none"
    ] = 2000
    trigger_checkpoint: Annotated[
        Literal["0.8", "0.5", "0.2"],
        "unlearned checkpoint, by its accuracy, to recover triggers from",
    ] = "0.5"
    sample_checkpoint: Annotated[
        Literal["0.8", "0.5", "0.2"], "unlearned checkpoint, by its accuracy, for sample detectors"
    ] = "0.2"
    include_benign: Annotated[
        bool, "run the label detectors on the benign model too, to count their false alarms"
    ] = False
    labels: Annotated[tuple[str, ...], MinLen(1), "label detectors to run"] = (
        "prediction_drift",
        "trigger_survival",
        "consensus",
        "latent_trigger",
        "trigger_size",
        "neural_cleanse_index",
        "mm_bd",
    )
    samples: Annotated[tuple[str, ...], MinLen(1), "sample detectors to run"] = (
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
                "detect.num_training_images must be 0 or at least 100, got"
                f" {self.num_training_images}"
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


@dataclass(frozen=True)
class Detectors:
    """The detectors of one run."""

    search: TriggerRecovery
    labels: list[LabelDetector]
    samples: list[SampleDetector]


def select_detectors(options: Detect, methods: Iterable[Method]) -> Detectors:
    """Those of `methods` that the options name, and `neural_cleanse` to recover triggers."""
    by_name: dict[str, Any] = {method.name: method for method in methods}
    return Detectors(
        by_name["neural_cleanse"],
        [by_name[name] for name in options.labels],
        [by_name[name] for name in options.samples],
    )


def recover_triggers(
    search: TriggerRecovery, models: Models, clean: ImageSet, seed: int, clock: Clock
) -> TriggersByModel:
    """The triggers of all labels, from each model."""
    triggers = {}
    for name, model in models.items():
        with clock(f"triggers_{name}"):
            rng = generator(seed, f"triggers/{name}")
            triggers[name] = search.recover(model, clean, rng=rng)
    return triggers


@dataclass(frozen=True)
class LabelScores:
    """The score that `detector` gives each class."""

    detector: LabelDetector
    scores: Float[Tensor, "k"]

    @property
    def verdict(self) -> LabelVerdict:
        return self.detector.verdict(self.scores)


def skipped_label_detectors(
    detectors: Sequence[LabelDetector], model: nn.Module, num_classes: int
) -> list[str]:
    """A sentence for each detector that cannot judge `model`; `run_label_detectors` skips it."""
    return [
        f"{detector.name} {obstacle} and was not run"
        for detector in detectors
        if (obstacle := detector.obstacle(model, num_classes))
    ]


def run_label_detectors(
    detectors: Sequence[LabelDetector],
    models: Models,
    triggers: TriggersByModel,
    trajectory: list[Epoch],
    clean: ImageSet,
    seed: int,
    clock: Clock,
) -> dict[str, LabelScores]:
    """The scores of each detector on each model, by `detector_key`.

    Detectors that need triggers run on the models that `triggers` has an entry for; those that
    unlearn by themselves, or judge no unlearned copy, on the given model alone. `trajectory` is
    that of the unlearning.
    """
    label_scores = {}
    for detector in detectors:
        if detector.obstacle(models["backdoored"], len(clean.classes)):
            continue
        for name, model in models.items():
            judges_copies = detector.judges_unlearned and not detector.needs_unlearned
            if name != "backdoored" and not judges_copies:
                continue
            if detector.needs_triggers and name not in triggers:
                continue
            evidence = Evidence(model, triggers.get(name, []), models["unlearned"], trajectory)
            key = detector_key(detector.name, name)
            stream = SEED_NAMES.get(detector.name, detector.name)
            with clock(f"labels_{key}"):
                rng = generator(seed, f"labels/{stream}")
                scores = detector.score_evidence(evidence, clean, rng=rng)
            label_scores[key] = LabelScores(detector, scores)
    return label_scores


def detector_key(detector: str, model: str) -> str:
    """The name of a detector, with that of the model behind it unless that is the given one."""
    return detector if model == "backdoored" else f"{detector}_{model}"


def recover_and_detect_labels(
    search: TriggerRecovery,
    detectors: Sequence[LabelDetector],
    models: Models,
    trajectory: list[Epoch],
    clean: ImageSet,
    seed: int,
    clock: Clock,
) -> dict[str, LabelScores]:
    """`run_label_detectors`, after recovering triggers where a detector needs them."""
    triggers = {}
    if any(detector.needs_triggers for detector in detectors):
        triggers = recover_triggers(search, models, clean, seed, clock)
    return run_label_detectors(detectors, models, triggers, trajectory, clean, seed, clock)


def unlearn_and_detect_labels(
    model: nn.Module,
    unlearn: Unlearn,
    detectors: Detectors,
    level: str,
    clean: ImageSet,
    seed: int,
    clock: Clock,
) -> dict[str, LabelScores]:
    """The same for a model that has not been unlearned yet.

    `level` is the checkpoint of the unlearning that detectors compare with.
    """
    with clock("unlearn"):
        unlearned = unlearn(model, clean, rng=generator(seed, "unlearn"))
    models = {"backdoored": model, "unlearned": restore_checkpoint(model, unlearned, level)}
    return recover_and_detect_labels(
        detectors.search, detectors.labels, models, unlearned.trajectory, clean, seed, clock
    )


class SampleResult(NamedTuple):
    """The scores of a sample detector.

    `clean_scores` are those of the defender's images that the unlearning has not seen; they set
    the threshold.
    """

    scores: Float[Tensor, "n"]
    clean_scores: Float[Tensor, "m"]


def score_candidates(
    detector: SampleDetector,
    model: nn.Module,
    images: Bytes,
    clean: DefenseSet,
    unlearned: nn.Module,
    seed: int,
) -> SampleResult:
    """Scores of the images, and of the defender's images, by the same random draws."""

    def score(candidates: Bytes) -> Tensor:
        rng = generator(seed, f"samples/{detector.name}")
        return detector.score(model, candidates, clean.train, rng=rng, unlearned=unlearned)

    return SampleResult(score(images), score(clean.val.images))


def run_sample_detectors(
    task: str,
    detectors: Sequence[SampleDetector],
    model: nn.Module,
    images: Bytes,
    clean: DefenseSet,
    unlearned: dict[str, nn.Module],
    seed: int,
    clock: Clock,
) -> dict[str, SampleResult]:
    """The result of each detector, by its name; `unlearned` is by name too."""
    results = {}
    for detector in detectors:
        name = detector.name
        with clock(f"{task}_{name}"):
            results[name] = score_candidates(detector, model, images, clean, unlearned[name], seed)
    return results


@dataclass(frozen=True)
class DetectorInput:
    """What detectors receive: the model, its unlearned checkpoints and the defender's images."""

    model: nn.Module
    get_checkpoint: GetCheckpoint
    trajectory: list[Epoch]
    clean: DefenseSet


@dataclass(frozen=True)
class Detection:
    """The results of all detectors.

    `benign_labels` is None where the label detectors did not run on the benign model. `samples`
    is by task and detector, `skipped` says which label detectors cannot judge the model.
    """

    triggers: TriggersByModel
    labels: dict[str, LabelScores]
    benign_labels: dict[str, LabelScores] | None
    skipped: list[str]
    candidates: dict[str, Candidates]
    samples: dict[str, dict[str, SampleResult]]
    seconds: dict[str, float]


def run_detection(
    given: DetectorInput,
    attack: KnownAttack,
    detectors: Detectors,
    options: Detect,
    *,
    seed: int,
    benign: nn.Module | None = None,
    unlearn: Unlearn = Unlearn(),
) -> Detection:
    """Run all detectors.

    Of the attack they receive the images to score, and nothing else. Where a `benign` model is
    given it is unlearned by `unlearn`, and each label that is predicted for it is a false alarm.
    """
    clock = Clock()
    clean = given.clean.train
    level = options.trigger_checkpoint
    models = {"backdoored": given.model, "unlearned": given.get_checkpoint(level)}
    triggers = recover_triggers(detectors.search, models, clean, seed, clock)
    labels = run_label_detectors(
        detectors.labels, models, triggers, given.trajectory, clean, seed, clock
    )
    benign_labels = None
    if benign is not None:
        benign_clock = Clock()
        benign_labels = unlearn_and_detect_labels(
            benign, unlearn, detectors, level, clean, seed, benign_clock
        )
        seconds = benign_clock.seconds.items()
        clock.seconds |= {f"benign_{name}": value for name, value in seconds}
    candidates = select_candidates(
        attack, options.num_test_images, options.num_training_images, seed
    )
    unlearned = unlearned_by_detector(
        detectors.samples, given.get_checkpoint, options.sample_checkpoint
    )
    samples = {
        task: run_sample_detectors(
            task, detectors.samples, given.model, part.images, given.clean, unlearned, seed, clock
        )
        for task, part in candidates.items()
    }
    skipped = skipped_label_detectors(detectors.labels, given.model, len(clean.classes))
    return Detection(triggers, labels, benign_labels, skipped, candidates, samples, clock.seconds)
