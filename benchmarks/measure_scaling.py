"""Measurements of how the cost of RNP grows with the size of its inputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar, cast

import torch

from benchmarks.subprocesses import Result
from benchmarks.timing import timed
from rnp.attacks.badnets import BadNets
from rnp.data.base import Split
from rnp.data.shapes import Shapes
from rnp.io.datasets import load_defense_set, save_defense_set
from rnp.io.models import load_model, save_model
from rnp.io.tensors import load_mask, save_mask
from rnp.models.build import Architecture
from rnp.params.fields import from_section
from rnp.params.presets import FOLDER as PRESETS
from rnp.params.read import flatten, read_params
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.seeds import generator
from rnp.training.device import default_device
from rnp.training.malloc import keep_freed_pages
from rnp.training.predict import accuracy
from rnp.training.recipe import Train
from rnp.types import DefenseSet
from rnp.unlearn import Unlearn

T = TypeVar("T")
STEPS = 40
"""Of unlearning, at most, for models that do not stop by themselves."""


def demo(kind: type[T], **changes: object) -> T:
    """`kind` with the settings of the preset demo."""
    section = read_params(PRESETS / "demo.yaml").get(kind.__name__.lower(), {})
    return cast("T", from_section(kind, dict(flatten(section)) | changes))


def scale_subject(folder: str, width: int, side: int) -> Result:
    """Write a backdoored ResNet-18 and the defender's 2,000 clean images.

    The model is trained for four passes over 6,000 generated shapes.
    """
    keep_freed_pages()
    rng = torch.Generator().manual_seed(0)
    path = Path(folder)
    train, test = Shapes(train=8000, test=1000, size=side).load(path, rng=rng)
    splits = Split(defense_train=1000, defense_val=1000)(train, test, rng=rng)
    architecture = Architecture(arch="resnet18", width=width)
    data = BadNets().poison(splits.pool, rng=rng).apply(splits.pool)
    model = architecture.build_for(data, rng=rng).to(default_device())
    recipe = Train(epochs=4, batch_size=32, lr=0.05, weight_decay=0.005)
    _, numbers = timed(lambda: recipe(model, data, rng=rng))
    save_model(path / "model.safetensors", model, architecture, data.classes)
    save_defense_set(path / "defense", splits.defense)
    return numbers | {"clean_accuracy": accuracy(model, test, precision="auto")}


def scale_unlearn(folder: str, images: int) -> Result:
    """Unlearn for at most `STEPS` steps."""
    keep_freed_pages()
    path = Path(folder)
    clean = first_images(folder, images).train
    model, architecture, classes = load_model(path / "model.safetensors")
    per_epoch = math.ceil(images / demo(Unlearn).batch_size)
    unlearn = demo(Unlearn, until_collapse=False, epochs=math.ceil(STEPS / per_epoch))
    result, numbers = timed(lambda: unlearn(model, clean, rng=generator(0, "unlearn")))
    save_model(path / "unlearned.safetensors", result.model, architecture, classes)
    steps = result.trajectory[-1].step
    return numbers | {"steps": steps, "seconds_per_step": numbers["seconds"] / steps}


def scale_recover(folder: str, images: int) -> Result:
    keep_freed_pages()
    path = Path(folder)
    clean = first_images(folder, images).train
    recover = demo(Recover)
    model, _, _ = load_model(path / "unlearned.safetensors")
    result, numbers = timed(lambda: recover(model, clean, rng=generator(0, "recover")))
    save_mask(path / "mask.safetensors", result.mask)
    return numbers | {"steps": recover.steps}


def scale_prune(folder: str, images: int, max_fraction: float) -> Result:
    keep_freed_pages()
    path = Path(folder)
    clean = first_images(folder, images).all
    model, _, _ = load_model(path / "model.safetensors")
    mask = load_mask(path / "mask.safetensors")
    prune = demo(Prune, max_fraction=max_fraction)
    result, numbers = timed(lambda: prune(model, mask, clean))
    return numbers | {
        "tried": int(max_fraction * sum(map(len, mask.values()))),
        "pruned": result.chosen.pruned,
    }


def first_images(folder: str, images: int) -> DefenseSet:
    """The first images of each half; their classes are spread evenly."""
    halves = load_defense_set(Path(folder) / "defense")
    train, val = (part.subset(torch.arange(images)) for part in (halves.train, halves.val))
    return DefenseSet(train, val)
