"""Recover triggers, predict the target label and find triggered images, and score all of it.

Detectors receive the defender's images, the models and the images to score; what is known of the
attack serves to score the detectors only.
"""

from __future__ import annotations

import functools
from pathlib import Path

import click
import torch

from rnp.cli.options import Files, command
from rnp.detection.candidates import KnownAttack
from rnp.detection.metrics import (
    detection_metrics,
    roc_by_detector,
    target_triggers,
    visible_trigger,
)
from rnp.detection.run import (
    Detect,
    DetectorInput,
    TriggersByModel,
    detectors,
    run_detection,
    select_detectors,
)
from rnp.detection.unlearned import load_checkpoint
from rnp.io.datasets import load_array, load_defense_set, load_images, load_poisoned, load_trigger
from rnp.io.files import read_json, write_json
from rnp.io.history import read_trajectory
from rnp.io.models import load_model
from rnp.io.tensors import save_tensors
from rnp.registry import Method
from rnp.reporting.plots import recovered_triggers, roc
from rnp.unlearn import Unlearn


@command(
    "detect",
    Detect,
    (Unlearn, "unlearn."),
    *detectors(),
    inputs=("model", "benign", "unlearned", "defense", "test", "triggered", "pool", "poisoned"),
    outputs={"out": "the recovered triggers"},
)
def detect(options: Detect, unlearn: Unlearn, *methods: Method, files: Files, seed: int) -> None:
    """Recover triggers, predict the target label and find triggered images.

    OUT gets the recovered triggers, REPORT the scores of each detector. The options of the
    unlearning are for the benign model alone: of MODEL the checkpoints in UNLEARNED are read.
    """
    backdoored, _, classes = load_model(files.model)
    given = DetectorInput(
        backdoored,
        functools.partial(load_checkpoint, files.unlearned),
        read_trajectory(files.unlearned / "trajectory.csv"),
        load_defense_set(files.defense),
    )
    attack = load_attack(files.test, files.triggered, files.pool, files.poisoned)
    selected = select_detectors(options, methods)
    detection = run_detection(
        given,
        attack,
        selected,
        options,
        seed=seed,
        benign=load_model(files.benign)[0] if options.include_benign else None,
        unlearn=unlearn,
    )
    for sentence in detection.skipped:
        click.echo(f"warning: {sentence}", err=True)
    save_triggers(files.out, detection.triggers)
    metrics = detection_metrics(detection, attack, selected, backdoored, options.num_test_images)
    write_json(files.report / "metrics.json", metrics)
    write_json(files.report / "seconds.json", detection.seconds)
    plot_triggers(files.report / "triggers.png", attack, detection.triggers, classes)
    roc(files.report / "roc.png", roc_by_detector(detection))


def load_attack(test: Path, triggered: Path, pool: Path, poisoned: Path) -> KnownAttack:
    """What is known of the attack, from the folders of earlier stages."""
    losses = triggered / "losses.npy"
    return KnownAttack(
        read_json(triggered / "attack.json")["target_label"],
        load_trigger(triggered / "trigger.safetensors"),
        load_images(test),
        load_images(triggered / "test"),
        load_images(pool),
        load_poisoned(poisoned)[0],
        load_array(losses) if losses.exists() else None,
    )


def save_triggers(path: Path, triggers: TriggersByModel) -> None:
    """Write the masks and patterns of all labels."""
    tensors = {
        f"{name}.{part}": torch.stack([getattr(trigger, part) for trigger in by_label])
        for name, by_label in triggers.items()
        for part in ("mask", "pattern")
    }
    save_tensors(path, tensors, {"kind": "recovered triggers"})


def plot_triggers(
    path: Path, attack: KnownAttack, triggers: TriggersByModel, classes: tuple[str, ...]
) -> None:
    """The true trigger beside the recovered ones."""
    example = attack.tests.subset(torch.tensor([0])).as_floats()
    pictures = [
        (f"{name} model, class {classes[trigger.label]}", trigger.pattern, trigger.mask)
        for name, trigger in target_triggers(triggers, attack.target).items()
    ]
    recovered_triggers(path, visible_trigger(attack.trigger, example), pictures)
