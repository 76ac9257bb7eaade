"""Make the trigger and poison the training set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click
import torch

from rnp.attacks.base import Attack
from rnp.cli.options import Family, Files, command
from rnp.io.datasets import load_images, save_poisoned
from rnp.io.files import write_json
from rnp.io.models import load_model
from rnp.registry import load
from rnp.reporting.plots import trigger_grid
from rnp.seeds import generator
from rnp.types import ImageSet, PoisonedSet, to_floats


def poison_images(attack: Attack, *, files: Files, seed: int) -> None:
    """Make the trigger and poison the training set.

    OUT gets the changed images with their positions and labels, the trigger and the options.
    """
    clean = load_images(files.pool)
    surrogate, _, _ = load_model(files.benign)
    poisoned = attack.poison(clean, rng=generator(seed, "poison"), surrogate=surrogate)
    save_poisoned(files.out, poisoned, {"attack": attack.name, **dataclasses.asdict(attack)})
    largest_change = plot_examples(files.report / "triggers.png", clean, poisoned)
    counts = {
        "poisoned": int((~poisoned.covers).sum()),
        "covers": int(poisoned.covers.sum()),
        "pool": len(clean),
        "largest_change": largest_change,
    }
    write_json(files.report / "metrics.json", counts)


def plot_examples(path: Path, clean: ImageSet, poisoned: PoisonedSet) -> float:
    """Draw a few poisoned images and covers; the largest change of a pixel among them.

    An attack on the weights changes no image: then the first clean images show its trigger.
    """
    shown = [(~poisoned.covers).nonzero()[:4], poisoned.covers.nonzero()[:2]]
    first = torch.cat(shown).squeeze(1)
    if len(first):
        stored = to_floats(poisoned.images[first])
        originals = to_floats(clean.images[poisoned.positions[first]])
    else:
        stored = None
        originals = to_floats(clean.images[:6])
    triggered = poisoned.trigger(originals)
    trigger_grid(path, originals, triggered, stored)
    return float((triggered - originals).abs().max())


def poison_command(name: str) -> click.Command:
    """The command for the attack `name`."""
    return command(name, load("attack", name), inputs=("pool", "benign"))(poison_images)


poison = Family(
    "poison",
    family="attack",
    make=poison_command,
    help="Make the trigger of an attack and poison the training set.",
)
