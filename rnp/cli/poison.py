"""Make the trigger and poison the training set."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from rnp.attacks.base import Attack
from rnp.cli.options import command
from rnp.io.datasets import load_images, save_poisoned
from rnp.io.files import write_json
from rnp.io.models import load_model
from rnp.params.choices import ChooseAttack
from rnp.registry import load, names
from rnp.reporting.plots import trigger_grid
from rnp.seeds import generator
from rnp.types import to_floats

ATTACKS = tuple((load("attack", name), f"{name}.") for name in names("attack"))


@command("poison", ChooseAttack, *ATTACKS, inputs=("pool", "benign"))
def poison(
    choice: ChooseAttack,
    *attacks: Attack,
    pool: Path,
    benign: Path,
    out: Path,
    report: Path,
    seed: int,
) -> None:
    """Write to OUT the changed images with their positions and labels, the trigger, and the
    attack's options.
    """
    attack = next(each for each in attacks if each.name == choice.attack)
    clean = load_images(pool)
    surrogate, _, _ = load_model(benign)
    poisoned = attack.poison(clean, rng=generator(seed, "poison"), surrogate=surrogate)
    save_poisoned(out, poisoned, {"attack": attack.name, **dataclasses.asdict(attack)})
    first = torch.cat([(~poisoned.covers).nonzero()[:4], poisoned.covers.nonzero()[:2]]).squeeze(1)
    stored = (
        to_floats(poisoned.images[first]) if len(first) else None
    )  # an attack on the weights changes no image
    originals = to_floats(
        clean.images[poisoned.positions[first]] if len(first) else clean.images[:6]
    )
    trigger_grid(report / "triggers.png", originals, poisoned.trigger(originals), stored)
    write_json(
        report / "metrics.json",
        {
            "poisoned": int((~poisoned.covers).sum()),
            "covers": int(poisoned.covers.sum()),
            "pool": len(clean),
            "largest_change": float((poisoned.trigger(originals) - originals).abs().max()),
        },
    )
