"""Recover triggers, name the target label and find triggered images, with the unlearned model and
without it.

The detectors see the defender's images, the models and the images that they are to judge; what is
known of the attack serves to score them, nothing else.
"""

from __future__ import annotations

from pathlib import Path

import torch

from rnp.cli.options import command
from rnp.clock import Clock
from rnp.detection.base import (
    RecoveredTrigger,
)
from rnp.detection.candidates import from_test_images, from_training_images
from rnp.detection.run import (
    Detect,
    detectors,
    label_metrics,
    recover_triggers,
    roc_points,
    run_label_detectors,
    run_sample_detectors,
    smallest,
    trigger_scores,
    unlearn_and_detect_labels,
)
from rnp.detection.unlearned import load_checkpoint, unlearned_by_detector
from rnp.io.datasets import load_array, load_defense_set, load_images, load_poisoned, load_trigger
from rnp.io.files import read_json, write_json
from rnp.io.history import read_trajectory
from rnp.io.models import load_model
from rnp.io.tensors import save_tensors
from rnp.registry import Method
from rnp.reporting.plots import recovered_triggers, roc
from rnp.seeds import generator
from rnp.types import Images, Trigger
from rnp.unlearn import Unlearn


@command(
    "detect",
    Detect,
    Unlearn,
    *detectors(),
    inputs=("model", "benign", "unlearned", "defense", "test", "triggered", "pool", "poisoned"),
)
def detect(
    options: Detect,
    unlearn: Unlearn,
    *methods: Method,
    model: Path,
    benign: Path,
    unlearned: Path,
    defense: Path,
    test: Path,
    triggered: Path,
    pool: Path,
    poisoned: Path,
    out: Path,
    report: Path,
    seed: int,
) -> None:
    """Write the recovered triggers to OUT, and to REPORT how right each detector was.

    The options of the unlearning are for the benign model alone.
    """
    victim, _, classes = load_model(model)
    clean, attack = load_defense_set(defense), read_json(triggered / "attack.json")
    target, truth = attack["target_label"], load_trigger(triggered / "trigger.safetensors")
    ask_for, clock = {method.name: method for method in methods}, Clock()

    nets = {
        "backdoored": victim,
        "unlearned": load_checkpoint(unlearned, options.trigger_checkpoint),
    }
    found = recover_triggers(ask_for["neural_cleanse"], nets, clean.train, seed, clock)
    save_tensors(
        out,
        {
            f"{name}.{part}": torch.stack([getattr(t, part) for t in triggers])
            for name, triggers in found.items()
            for part in ("mask", "pattern")
        },
        {"kind": "recovered triggers"},
    )
    said = run_label_detectors(
        [ask_for[name] for name in options.labels],
        nets,
        found,
        read_trajectory(unlearned / "trajectory.csv"),
        clean.train,
        seed,
        clock,
    )
    of_the_twin, apart = {}, Clock()
    if options.include_benign:  # each label that is named there is a false alarm
        alarms = unlearn_and_detect_labels(
            load_model(benign)[0], unlearn, ask_for, options, clean.train, seed, apart
        )
        of_the_twin = {"benign_labels": label_metrics(alarms, None)}
        clock.seconds |= {f"benign_{name}": value for name, value in apart.seconds.items()}

    tests, changes = load_images(test), load_poisoned(poisoned)[0]
    best = {
        name: triggers[smallest(triggers) if target is None else target]
        for name, triggers in found.items()
    }
    suspects = {
        "samples": from_test_images(
            tests, load_images(triggered / "test"), target, options.num_test_images
        )
    }
    if options.num_training_images and (~changes.covers).any():
        suspects["training_samples"] = from_training_images(
            load_images(pool),
            changes,
            target,
            options.num_training_images,
            generator(seed, "training_samples"),
        )
    screens = [ask_for[name] for name in options.samples]
    weak = unlearned_by_detector(screens, unlearned, options.sample_checkpoint)
    answers = {
        task: run_sample_detectors(task, screens, victim, them.images, clean, weak, seed, clock)
        for task, them in suspects.items()
    }
    judged = {
        task: {
            each.name: them.judge(*answers[task][each.name], each.needs_unlearned)
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

    plot_triggers(
        report / "triggers.png", truth, tests.subset(torch.tensor([0])).as_floats(), best, classes
    )
    roc(
        report / "roc.png",
        {
            name: roc_points(scores, suspects["samples"].positives)
            for name, (scores, _) in answers["samples"].items()
        },
    )
    write_json(
        report / "metrics.json",
        {
            "target_label": -1 if target is None else target,
            "triggers": {
                name: trigger_scores(trigger, truth.support, victim, tests, options.num_test_images)
                for name, trigger in best.items()
            },
            "labels": label_metrics(said, target),
            **of_the_twin,
            **judged,
        },
    )
    write_json(report / "seconds.json", clock.seconds)


def plot_triggers(
    path: Path,
    truth: Trigger,
    example: Images,
    best: dict[str, RecoveredTrigger],
    classes: tuple[str, ...],
) -> None:
    """The true trigger beside the recovered ones. One over the whole image is shown by what it
    does to `example`, around mid-gray.
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
