"""Recover triggers, name the target label and find triggered images, with the unlearned model and
without it.

The detectors see the defender's images, the models and the images that they are to judge; what is
known of the attack serves to score them, nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import click
import torch
from torch import Tensor, nn

from rnp.cli.options import command, generator
from rnp.cli.screening import ask, checkpoint, consulted, curve, drawn, screened
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
from rnp.io import (
    load_array,
    load_defence_set,
    load_images,
    load_model,
    load_poisoned,
    load_trigger,
    read_json,
    read_trajectory,
    save_tensors,
    write_json,
)
from rnp.plots import recovered_triggers, roc
from rnp.registry import Method, load, names, suggest
from rnp.training import predict
from rnp.types import Bytes, DefenceSet, Epoch, Images, ImageSet, Trigger
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class Detect:
    images: Annotated[
        int, "clean test images, and as many triggered ones, among which the latter are to be found"
    ] = 500
    training_images: Annotated[
        int, "images of the poisoned training set among which to find the poisoned ones; 0: none"
    ] = 2000
    trigger_model: Annotated[
        Literal["0.8", "0.5", "0.2"],
        "unlearned checkpoint, by its accuracy, to recover triggers from",
    ] = "0.5"
    sample_model: Annotated[
        Literal["0.8", "0.5", "0.2"], "unlearned checkpoint, by its accuracy, to find samples with"
    ] = "0.2"
    twin: Annotated[
        bool,
        "unlearn the benign twin too, and ask the detectors of the label for their false alarms",
    ] = False
    labels: Annotated[tuple[str, ...], "detectors of the label to ask"] = (
        "class_shares",
        "trigger_survival",
        "agreement",
        "neural_cleanse_index",
        "mm_bd",
    )
    samples: Annotated[tuple[str, ...], "detectors of triggered images to ask"] = (
        "confidence",
        "unlearned_mahalanobis",
        "mahalanobis",
        "strip",
        "badexpert",
        "spectral_signatures",
        "activation_clustering",
    )

    def __post_init__(self) -> None:
        if self.images < 10:
            raise UserError(f"detect.images must be at least 10, got {self.images}")
        if self.training_images and self.training_images < 100:
            raise UserError(
                f"detect.training_images must be 0 or at least 100, got {self.training_images}"
            )
        for family in ("labels", "samples"):
            if not getattr(self, family):
                raise UserError(f"detect.{family} must name at least one detector")
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


@command(
    "detect",
    Detect,
    Unlearn,
    *detectors(),
    inputs=("model", "benign", "unlearned", "defence", "test", "triggered", "pool", "poisoned"),
)
def detect(
    options: Detect,
    unlearn: Unlearn,
    *methods: Method,
    model: Path,
    benign: Path,
    unlearned: Path,
    defence: Path,
    test: Path,
    triggered: Path,
    pool: Path,
    poisoned: Path,
    out: Path,
    report: Path,
    seed: int,
) -> None:
    """Write the recovered triggers to OUT, and to REPORT how right each detector was.

    The options of the unlearning are for the twin alone.
    """
    victim, _, classes = load_model(model)
    clean, attack = load_defence_set(defence), read_json(triggered / "attack.json")
    target, truth = attack["target_label"], load_trigger(triggered / "trigger.safetensors")
    ask_for, clock = {method.name: method for method in methods}, Clock()

    nets = {"backdoored": victim, "unlearned": checkpoint(unlearned, options.trigger_model)}
    found = searched(ask_for["neural_cleanse"], nets, clean.train, seed, clock)
    save_tensors(
        out,
        {
            f"{name}.{part}": torch.stack([getattr(t, part) for t in triggers])
            for name, triggers in found.items()
            for part in ("mask", "pattern")
        },
        {"kind": "recovered triggers"},
    )
    said = labelled(
        [ask_for[name] for name in options.labels],
        nets,
        found,
        read_trajectory(unlearned / "trajectory.csv"),
        clean.train,
        seed,
        clock,
    )
    of_the_twin, apart = {}, Clock()
    if options.twin:  # each label that is named there is a false alarm
        alarms = unlearned_and_labelled(
            load_model(benign)[0], unlearn, ask_for, options, clean.train, seed, apart
        )
        of_the_twin = {"twin_labels": told(alarms, None)}
        clock.seconds |= {f"twin_{name}": value for name, value in apart.seconds.items()}

    tests, changes = load_images(test), load_poisoned(poisoned)[0]
    best = {
        name: triggers[smallest(triggers) if target is None else target]
        for name, triggers in found.items()
    }
    suspects = {"samples": screened(tests, load_images(triggered / "test"), target, options.images)}
    if options.training_images and (~changes.covers).any():
        suspects["training_samples"] = drawn(
            load_images(pool),
            changes,
            target,
            options.training_images,
            generator(seed, "training_samples"),
        )
    screens = [ask_for[name] for name in options.samples]
    weak = consulted(screens, unlearned, options.sample_model)
    answers = {
        task: answered(task, screens, victim, them.images, clean, weak, seed, clock)
        for task, them in suspects.items()
    }
    judged = {
        task: {
            each.name: them.judge(*answers[task][each.name], each.asks_unlearned)
            for each in screens
        }
        for task, them in suspects.items()
    }
    losses = triggered / "losses.npy"
    if "training_samples" in suspects and losses.exists():
        them = suspects["training_samples"]
        scores = -load_array(losses)[
            them.places
        ]  # the defender's images have none: the clean ones scored set the threshold
        judged["training_samples"]["training_loss"] = them.judge(
            scores, scores[~them.positives], False
        )

    picture(report / "triggers.png", truth, tests.subset(torch.tensor([0])).floats(), best, classes)
    roc(
        report / "roc.png",
        {
            name: curve(scores, suspects["samples"].positives)
            for name, (scores, _) in answers["samples"].items()
        },
    )
    write_json(
        report / "metrics.json",
        {
            "target_label": -1 if target is None else target,
            "triggers": {
                name: trigger_scores(trigger, truth.support, victim, tests, options.images)
                for name, trigger in best.items()
            },
            "labels": told(said, target),
            **of_the_twin,
            **judged,
        },
    )
    write_json(report / "seconds.json", clock.seconds)


class Clock:
    """Seconds by name: `with clock("name"): work`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def searched(
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


def labelled(
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
        if len(clean.classes) < detector.fewest_classes:
            click.echo(
                f"warning: {detector.name} needs {detector.fewest_classes} classes and was not"
                " asked",
                err=True,
            )
            continue
        for name, net in nets.items():
            if (detector.asks_unlearned and name != "backdoored") or (
                detector.asks_triggers and name not in found
            ):
                continue
            with clock(f"labels_{suffixed(detector.name, name)}"):
                evidence = Evidence(net, found.get(name, []), nets["unlearned"], trajectory)
                scores = detector.judge(
                    evidence, clean, rng=generator(seed, f"labels/{detector.name}")
                )
            said[suffixed(detector.name, name)] = LabelScores(detector, scores)
    return said


def suffixed(detector: str, net: str) -> str:
    return detector if net == "backdoored" else f"{detector}_{net}"


def unlearned_and_labelled(
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
        unlearned.checkpoints.get(options.trigger_model, unlearned.checkpoints["end"])
    )
    nets = {"backdoored": model, "unlearned": weak.eval()}
    return searched_and_labelled(
        ask_for["neural_cleanse"],
        [ask_for[name] for name in options.labels],
        nets,
        unlearned.trajectory,
        clean,
        seed,
        clock,
    )


def searched_and_labelled(
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
        searched(search, nets, clean, seed, clock)
        if any(each.asks_triggers for each in detectors)
        else {}
    )
    return labelled(detectors, nets, found, trajectory, clean, seed, clock)


def told(said: dict[str, LabelScores], target: int | None) -> dict[str, dict]:
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


def answered(
    task: str,
    screens: list[SampleDetector],
    victim: nn.Module,
    images: Bytes,
    clean: DefenceSet,
    weak: dict[str, nn.Module],
    seed: int,
    clock: Clock,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What `ask` gets from each detector, by its name."""
    answers = {}
    for each in screens:
        with clock(f"{task}_{each.name}"):
            answers[each.name] = ask(each, victim, images, clean, weak[each.name], seed)
    return answers


def picture(
    path: Path,
    truth: Trigger,
    example: Images,
    best: dict[str, RecoveredTrigger],
    classes: tuple[str, ...],
) -> None:
    """The true trigger beside the recovered ones. One over the whole image is shown by what it
    does to `example`, around mid-grey.
    """
    if truth.support is None:
        pattern, covered = ((truth(example) - example)[0] / 2 + 0.5), torch.ones(example.shape[2:])
    else:
        pattern, covered = truth(torch.zeros_like(example))[0], truth.support.float()
    recovered_triggers(
        path,
        (pattern, covered),
        [
            (f"{name} model, class {classes[trigger.label]}", trigger.pattern, trigger.mask)
            for name, trigger in best.items()
        ],
    )


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
    hits = predict(victim, trigger.apply(others.floats())).argmax(1) == trigger.label
    scores = {"l1": trigger.l1, "success": hits.float().mean().item(), "gain": trigger.gain}
    if support is not None:
        scores |= {"iou": iou(trigger.mask, support), "iou_top_k": iou_top_k(trigger.mask, support)}
    return scores
