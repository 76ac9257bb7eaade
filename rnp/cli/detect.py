"""Recover triggers, name the target label and find triggered images, with the unlearned model and without it.

The detectors see the defender's images, the models and the images that they are to judge; what is known of the attack serves
to score them, nothing else.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import click
import torch
from torch import Tensor, nn

from rnp.attacks.base import Poisoned
from rnp.cli.options import command, generator
from rnp.detection.base import (Evidence, LabelDetector, LabelVerdict, RecoveredTrigger, SampleDetector, TriggerRecovery, iou, iou_top_k,
                                judge)
from rnp.errors import UserError
from rnp.io import (load_array, load_defence_set, load_images, load_model, load_poisoned, load_trigger, read_json, read_trajectory,
                    save_tensors, write_json)
from rnp.plots import recovered_triggers, roc
from rnp.registry import Method, load, names, suggest
from rnp.training import predict
from rnp.types import Bytes, DefenceSet, Epoch, ImageSet, Images, Indices, Logits
from rnp.unlearn import Unlearn

LEVELS = ("0.8", "0.5", "0.2")
"""The unlearned checkpoints, by their accuracy."""
FEWEST = 20
"""Poisoned training images to look for, where there are as many: of fewer an AUROC says little."""


@dataclass(frozen=True, kw_only=True)
class Detect:
    images: Annotated[int, "clean test images, and as many triggered ones, among which the latter are to be found"] = 500
    training_images: Annotated[int, "images of the poisoned training set among which to find the poisoned ones; 0: none"] = 2000
    trigger_model: Annotated[Literal["0.8", "0.5", "0.2"], "unlearned checkpoint, by its accuracy, to recover triggers from"] = "0.5"
    sample_model: Annotated[Literal["0.8", "0.5", "0.2"], "unlearned checkpoint, by its accuracy, to find samples with"] = "0.2"
    twin: Annotated[bool, "unlearn the benign twin too, and ask the detectors of the label for their false alarms"] = False
    labels: Annotated[tuple[str, ...], "detectors of the label to ask"] = (
        "class_shares", "trigger_survival", "agreement", "neural_cleanse_index", "mm_bd")
    samples: Annotated[tuple[str, ...], "detectors of triggered images to ask"] = (
        "confidence", "unlearned_mahalanobis", "mahalanobis", "strip", "badexpert", "spectral_signatures", "activation_clustering")

    def __post_init__(self) -> None:
        if self.images < 10:
            raise UserError(f"detect.images must be at least 10, got {self.images}")
        if self.training_images and self.training_images < 100:
            raise UserError(f"detect.training_images must be 0 or at least 100, got {self.training_images}")
        for family in ("labels", "samples"):
            if not getattr(self, family):
                raise UserError(f"detect.{family} must name at least one detector")
            for name in getattr(self, family):
                if name not in names(family):
                    raise UserError(f"detect.{family}: unknown detector {name!r}{suggest(name, names(family))}")


def detectors() -> list[tuple[type[Method], str]]:
    """Every detector, with the prefix of its options."""
    return [(load(family, name), f"{name}.") for family in ("triggers", "labels", "samples") for name in names(family)]


@command("detect", Detect, Unlearn, *detectors(),
         inputs=("model", "benign", "unlearned", "defence", "test", "triggered", "pool", "poisoned"))
def detect(options: Detect, unlearn: Unlearn, *methods: Method, model: Path, benign: Path, unlearned: Path, defence: Path, test: Path,
           triggered: Path, pool: Path, poisoned: Path, out: Path, report: Path, seed: int) -> None:
    """Write the recovered triggers to OUT, and to REPORT how right each detector was.

    The options of the unlearning are for the twin alone.
    """
    victim, _, classes = load_model(model)
    clean, attack = load_defence_set(defence), read_json(triggered / "attack.json")
    target, truth = attack["target_label"], load_trigger(triggered / "trigger.safetensors")
    ask_for, clock = {method.name: method for method in methods}, Clock()

    nets = {"backdoored": victim, "unlearned": checkpoint(unlearned, options.trigger_model)}
    found = searched(ask_for["neural_cleanse"], nets, clean.train, seed, clock)
    save_tensors(out, {f"{name}.{part}": torch.stack([getattr(t, part) for t in triggers])
                       for name, triggers in found.items() for part in ("mask", "pattern")}, {"kind": "recovered triggers"})
    said = labelled([ask_for[name] for name in options.labels], nets, found, read_trajectory(unlearned / "trajectory.csv"),
                    clean.train, seed, clock)
    of_the_twin, apart = {}, Clock()
    if options.twin:  # each label that is named there is a false alarm
        alarms = unlearned_and_labelled(load_model(benign)[0], unlearn, ask_for, options, clean.train, seed, apart)
        of_the_twin = {"twin_labels": told(alarms, None)}
        clock.seconds |= {f"twin_{name}": value for name, value in apart.seconds.items()}

    tests, changes = load_images(test), load_poisoned(poisoned)[0]
    best = {name: triggers[smallest(triggers) if target is None else target] for name, triggers in found.items()}
    suspects = {"samples": screened(tests, load_images(triggered / "test"), target, options.images)}
    if options.training_images and (~changes.covers).any():
        suspects["training_samples"] = drawn(load_images(pool), changes, target, options.training_images,
                                             generator(seed, "training_samples"))
    weak = consulted([ask_for[name] for name in options.samples], unlearned, options.sample_model)
    judged, curves = {task: {} for task in suspects}, {}
    for task, them in suspects.items():
        for name in options.samples:
            with clock(f"{task}_{name}"):
                scores, own = ask(ask_for[name], victim, them.images, clean, weak[name], seed)
            judged[task][name] = them.judge(scores, own, ask_for[name].asks_unlearned)
            if task == "samples":
                curves[name] = curve(scores, them.positives)
    losses = triggered / "losses.npy"
    if "training_samples" in suspects and losses.exists():
        them = suspects["training_samples"]
        scores = -load_array(losses)[them.places]  # the defender's images have none: the clean ones scored set the threshold
        judged["training_samples"]["training_loss"] = them.judge(scores, scores[~them.positives], False)

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
        "labels": told(said, target),
        **of_the_twin,
        **judged,
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


@dataclass(frozen=True)
class LabelScores:
    """What `detector` gave each class."""

    detector: LabelDetector
    scores: Tensor  # float [k]

    @property
    def verdict(self) -> LabelVerdict:
        return self.detector.verdict(self.scores)


def labelled(detectors: list[LabelDetector], nets: dict[str, nn.Module], found: dict[str, list[RecoveredTrigger]],
             trajectory: list[Epoch], clean: ImageSet, seed: int, clock: Clock) -> dict[str, LabelScores]:
    """What each detector says of each model; those that judge by triggers are asked of the models that `found` has triggers of."""
    said = {}
    for detector in detectors:
        if len(clean.classes) < detector.fewest_classes:
            click.echo(f"warning: {detector.name} needs {detector.fewest_classes} classes and was not asked", err=True)
            continue
        for name, net in nets.items():
            if (detector.asks_unlearned and name != "backdoored") or (detector.asks_triggers and name not in found):
                continue
            with clock(f"labels_{suffixed(detector.name, name)}"):
                evidence = Evidence(net, found.get(name, []), nets["unlearned"], trajectory)
                scores = detector.judge(evidence, clean, rng=generator(seed, f"labels/{detector.name}"))
            said[suffixed(detector.name, name)] = LabelScores(detector, scores)
    return said


def suffixed(detector: str, net: str) -> str:
    return detector if net == "backdoored" else f"{detector}_{net}"


def unlearned_and_labelled(model: nn.Module, unlearn: Unlearn, ask_for: dict[str, Method], options: Detect, clean: ImageSet,
                           seed: int, clock: Clock) -> dict[str, LabelScores]:
    """What the detectors of the label say of a model that has not been unlearned yet, and of its unlearned copy."""
    with clock("unlearn"):
        unlearned = unlearn(model, clean, rng=generator(seed, "unlearn"))
    weak = copy.deepcopy(model)
    weak.load_state_dict(unlearned.checkpoints.get(options.trigger_model, unlearned.checkpoints["end"]))
    nets = {"backdoored": model, "unlearned": weak.eval()}
    return searched_and_labelled(ask_for["neural_cleanse"], [ask_for[name] for name in options.labels], nets, unlearned.trajectory, clean,
                                 seed, clock)


def searched_and_labelled(search: TriggerRecovery, detectors: list[LabelDetector], nets: dict[str, nn.Module], trajectory: list[Epoch],
                          clean: ImageSet, seed: int, clock: Clock) -> dict[str, LabelScores]:
    """The same where triggers have not been recovered yet; they are when a detector asks for them."""
    found = searched(search, nets, clean, seed, clock) if any(each.asks_triggers for each in detectors) else {}
    return labelled(detectors, nets, found, trajectory, clean, seed, clock)


def told(said: dict[str, LabelScores], target: int | None) -> dict[str, dict]:
    verdicts = {name: each.verdict for name, each in said.items()}
    return {name: {"label": -1 if verdict.label is None else verdict.label, "margin": verdict.margin,
                   "correct": verdict.label == target} for name, verdict in verdicts.items()}


def checkpoint(unlearned: Path, level: str) -> nn.Module:
    """The unlearned model at the first fall below an accuracy; the last one where it never fell so far."""
    path = unlearned / f"accuracy_{level}.safetensors"
    return load_model(path if path.exists() else unlearned / "accuracy_end.safetensors")[0]


class Average(nn.Module):
    """Logits whose soft-max is the mean of those of `members`."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Images) -> Logits:
        return torch.stack([member(images).float().softmax(1) for member in self.members]).mean(0).clamp_min(1e-30).log()


def exposed(detector: SampleDetector, unlearned: Path, level: str) -> nn.Module:
    """The unlearned model that `detector` asks: the checkpoint at an accuracy, or the mean of all on the way."""
    return Average([checkpoint(unlearned, each) for each in LEVELS]) if detector.asks_average else checkpoint(unlearned, level)


def consulted(detectors: list[SampleDetector], unlearned: Path, level: str) -> dict[str, nn.Module]:
    """The model that `exposed` gives each detector, by its name; those that ask the same one share it."""
    made: dict[bool, nn.Module] = {}
    for detector in detectors:
        if detector.asks_average not in made:
            made[detector.asks_average] = exposed(detector, unlearned, level)
    return {detector.name: made[detector.asks_average] for detector in detectors}


def smallest(triggers: list[RecoveredTrigger]) -> int:
    """The label with the smallest trigger: all-to-all backdoors have no other one to show."""
    return min(triggers, key=lambda trigger: trigger.l1).label


@dataclass(frozen=True)
class Suspects:
    """Images to judge, which of them carry a trigger, which belong to the target class, and where they lie in their set."""

    images: Bytes
    positives: Tensor  # bool [n]
    targets: Tensor  # bool [n]
    places: Indices

    def judge(self, scores: Tensor, own: Tensor, asks_unlearned: bool) -> dict[str, object]:
        return dataclasses.asdict(judge(scores, self.positives, self.targets, own)) | {"asks_unlearned": asks_unlearned}


def screened(tests: ImageSet, attacked: ImageSet, target: int | None, n: int) -> Suspects:
    """`n` clean and as many triggered test images.

    The triggered ones are taken from the end of their set, so that few of them repeat a clean one.
    """
    n = min(n, len(tests), len(attacked))
    good, bad = torch.arange(n), torch.arange(len(attacked) - n, len(attacked))
    return gathered(tests.subset(good), attacked.subset(bad), target, torch.cat([good, bad]))


def drawn(pool: ImageSet, changes: Poisoned, target: int | None, n: int, rng: torch.Generator) -> Suspects:
    """`n` images of the poisoned training set at random, as many poisoned ones among them as among all, but `FEWEST` at least.

    Covers are left out: they are neither clean nor poisoned. The target class is that of the labels as they are in the set.
    """
    real, untouched = (~changes.covers).nonzero().squeeze(1), torch.ones(len(pool), dtype=torch.bool)
    untouched[changes.positions] = False
    good = untouched.nonzero().squeeze(1)
    n = min(n, len(good) + len(real))
    wanted = min(len(real), max(FEWEST, round(n * len(real) / (len(good) + len(real)))))
    bad, good = (those[torch.randperm(len(those), generator=rng)[:count]] for those, count in ((real, wanted), (good, n - wanted)))
    poisoned = ImageSet(changes.images[bad], changes.labels[bad], pool.classes)
    return gathered(pool.subset(good), poisoned, target, torch.cat([good, changes.positions[bad]]))


def gathered(clean: ImageSet, bad: ImageSet, target: int | None, places: Indices) -> Suspects:
    labels = torch.cat([clean.labels, bad.labels])
    return Suspects(torch.cat([clean.images, bad.images]), torch.arange(len(labels)) >= len(clean),
                    labels == (-1 if target is None else target), places)


def ask(detector: SampleDetector, victim: nn.Module, images: Bytes, clean: DefenceSet, weak: nn.Module,
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
