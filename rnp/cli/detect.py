"""Recover triggers, name the target label and find triggered images, with the unlearned model and without it.

The detectors see the defender's images and the models; the triggered test set serves to score them, nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import nn

from rnp.cli.options import command, generator
from rnp.detection.base import LabelDetector, LabelVerdict, RecoveredTrigger, SampleDetector, TriggerRecovery, iou, iou_top_k, judge
from rnp.errors import UserError
from rnp.io import load_defence_set, load_images, load_model, load_trigger, read_json, read_trajectory, save_tensors, write_json
from rnp.plots import recovered_triggers, roc
from rnp.registry import Method, load, names, suggest
from rnp.training import predict
from rnp.types import DefenceSet, Epoch, ImageSet


@dataclass(frozen=True, kw_only=True)
class Detect:
    images: Annotated[int, "clean test images, and as many triggered ones, among which the latter are to be found"] = 500
    trigger_model: Annotated[Literal["0.8", "0.5", "0.2"], "unlearned checkpoint, by its accuracy, to recover triggers from"] = "0.5"
    sample_model: Annotated[Literal["0.8", "0.5", "0.2"], "unlearned checkpoint, by its accuracy, to find samples with"] = "0.2"
    labels: Annotated[tuple[str, ...], "detectors of the label to ask"] = ("class_shares", "neural_cleanse_index", "mm_bd")
    samples: Annotated[tuple[str, ...], "detectors of triggered images to ask"] = (
        "confidence", "strip", "badexpert", "spectral_signatures", "activation_clustering")

    def __post_init__(self) -> None:
        if self.images < 10:
            raise UserError(f"detect.images must be at least 10, got {self.images}")
        for family in ("labels", "samples"):
            if not getattr(self, family):
                raise UserError(f"detect.{family} must name at least one detector")
            for name in getattr(self, family):
                if name not in names(family):
                    raise UserError(f"detect.{family}: unknown detector {name!r}{suggest(name, names(family))}")


def detectors() -> list[tuple[type[Method], str]]:
    """Every detector, with the prefix of its options."""
    return [(load(family, name), f"{name}.") for family in ("triggers", "labels", "samples") for name in names(family)]


@command("detect", Detect, *detectors(), inputs=("model", "unlearned", "defence", "test", "triggered"))
def detect(options: Detect, *methods: Method, model: Path, unlearned: Path, defence: Path, test: Path, triggered: Path, out: Path,
           report: Path, seed: int) -> None:
    """Write the recovered triggers to OUT, and to REPORT how right each detector was."""
    victim, _, classes = load_model(model)
    clean, attack = load_defence_set(defence), read_json(triggered / "attack.json")
    target, truth = attack["target_label"], load_trigger(triggered / "trigger.safetensors")
    ask_for, clock = {method.name: method for method in methods}, Clock()

    nets = {"backdoored": victim, "unlearned": checkpoint(unlearned, options.trigger_model)}
    found = searched(ask_for["neural_cleanse"], nets, clean.train, seed, clock)
    save_tensors(out, {f"{name}.{part}": torch.stack([getattr(t, part) for t in triggers])
                       for name, triggers in found.items() for part in ("mask", "pattern")}, {"kind": "recovered triggers"})
    verdicts = labelled([ask_for[name] for name in options.labels], nets, found, read_trajectory(unlearned / "trajectory.csv"),
                        clean.train, seed, clock)

    tests = load_images(test)
    best = {name: triggers[smallest(triggers) if target is None else target] for name, triggers in found.items()}
    images, positives, targets = screened(tests, load_images(triggered / "test"), target, options.images)
    weak = checkpoint(unlearned, options.sample_model)
    samples, curves = {}, {}
    for name in options.samples:
        with clock(f"samples_{name}"):
            scores = ask(ask_for[name], victim, images, clean, weak, seed)
        samples[name] = dataclasses.asdict(judge(scores[0], positives, targets, scores[1]))
        samples[name]["asks_unlearned"] = ask_for[name].asks_unlearned
        curves[name] = curve(scores[0], positives)

    example = tests.subset(torch.tensor([0])).floats()
    support = truth.support
    whole_image = support is None  # then there is no pattern to show, but what it does to an image, around mid-grey
    pattern = ((truth(example) - example)[0] / 2 + 0.5) if whole_image else truth(torch.zeros_like(example))[0]
    covered = torch.ones(example.shape[2:]) if whole_image else support.float()
    recovered_triggers(report / "triggers.png", (pattern, covered),
                       [(f"{name} model, class {classes[trigger.label]}", trigger.pattern, trigger.mask)
                        for name, trigger in best.items()])
    roc(report / "roc.png", curves)
    write_json(report / "metrics.json", {
        "target_label": -1 if target is None else target,
        "triggers": {name: trigger_scores(trigger, support, victim, tests, options.images) for name, trigger in best.items()},
        "labels": {name: {"label": -1 if verdict.label is None else verdict.label, "margin": verdict.margin,
                          "correct": verdict.label == target} for name, verdict in verdicts.items()},
        "samples": samples,
    })
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


def searched(search: TriggerRecovery, nets: dict[str, nn.Module], clean: ImageSet, seed: int,
             clock: Clock) -> dict[str, list[RecoveredTrigger]]:
    """The triggers of all labels, by the name of the model that they are recovered from."""
    found = {}
    for name, net in nets.items():
        with clock(f"triggers_{name}"):
            found[name] = search.recover(net, clean, rng=generator(seed, f"triggers/{name}"))
    return found


def labelled(detectors: list[LabelDetector], nets: dict[str, nn.Module], found: dict[str, list[RecoveredTrigger]],
             trajectory: list[Epoch], clean: ImageSet, seed: int, clock: Clock) -> dict[str, LabelVerdict]:
    """What each detector says of each model; `found` holds the triggers for the one that judges by them."""
    verdicts = {}
    for detector in detectors:
        if detector.name == "class_shares":  # it looks at the whole way to the collapse, which the unlearned model has behind it
            verdicts[detector.name] = detector.verdict(detector.from_trajectory(trajectory))
            continue
        for name, net in nets.items():
            with clock(f"labels_{suffixed(detector.name, name)}"):
                scores = (detector.from_triggers(found[name]) if detector.name == "neural_cleanse_index" else
                          detector.score(net, clean, rng=generator(seed, f"labels/{detector.name}")))
            verdicts[suffixed(detector.name, name)] = detector.verdict(scores)
    return verdicts


def suffixed(detector: str, net: str) -> str:
    return detector if net == "backdoored" else f"{detector}_{net}"


def checkpoint(unlearned: Path, level: str) -> nn.Module:
    """The unlearned model at the first fall below an accuracy; the last one where it never fell so far."""
    path = unlearned / f"accuracy_{level}.safetensors"
    return load_model(path if path.exists() else unlearned / "accuracy_end.safetensors")[0]


def smallest(triggers: list[RecoveredTrigger]) -> int:
    """The label with the smallest trigger: all-to-all backdoors have no other one to show."""
    return min(triggers, key=lambda trigger: trigger.l1).label


def screened(tests: ImageSet, attacked: ImageSet, target: int | None, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, which of them are triggered, and which belong to the target class: `n` clean and as many triggered ones.

    The triggered ones are taken from the end of their set, so that few of them repeat a clean one.
    """
    n = min(n, len(tests), len(attacked))
    clean, bad = tests.subset(torch.arange(n)), attacked.subset(torch.arange(len(attacked) - n, len(attacked)))
    labels = torch.cat([clean.labels, bad.labels])
    return torch.cat([clean.images, bad.images]), torch.arange(2 * n) >= n, labels == (-1 if target is None else target)


def ask(detector: SampleDetector, victim: nn.Module, images: torch.Tensor, clean: DefenceSet, weak: nn.Module,
        seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the screened images and of the defender's own, which set the threshold."""
    return tuple(detector.score(victim, each, clean.train, rng=generator(seed, f"samples/{detector.name}"), unlearned=weak)
                 for each in (images, clean.val.images))


def curve(scores: torch.Tensor, positives: torch.Tensor) -> tuple:
    from sklearn.metrics import roc_auc_score, roc_curve

    fpr, tpr, _ = roc_curve(positives, scores)
    return fpr, tpr, roc_auc_score(positives, scores)


def trigger_scores(trigger: RecoveredTrigger, support: torch.Tensor | None, victim: nn.Module, tests: ImageSet,
                   n: int) -> dict[str, float]:
    """Size of a recovered trigger, its ASR on the backdoored model, and its overlap with the true one if that is a patch.

    The ASR counts the first `n` test images of the classes that are not the trigger's.
    """
    others = tests.subset((tests.labels != trigger.label).nonzero().squeeze(1)[:n])
    hits = predict(victim, trigger.apply(others.floats())).argmax(1) == trigger.label
    scores = {"l1": trigger.l1, "success": hits.float().mean().item(), "gain": trigger.gain}
    if support is not None:
        scores |= {"iou": iou(trigger.mask, support), "iou_top_k": iou_top_k(trigger.mask, support)}
    return scores
