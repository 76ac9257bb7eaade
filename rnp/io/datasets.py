"""Image sets, defense sets, triggers and poisoned training sets."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnp.errors import UserError
from rnp.io.files import atomic_write, missing_file_error, read_json, write_json
from rnp.io.tensors import load_tensors, save_tensors
from rnp.types import DefenseSet, ImageSet, PoisonedSet, Trigger

RENAMED_TRIGGERS = {
    ("rnp.attacks.base", "Mix"): ("rnp.attacks.base", "BlendTrigger"),
    ("rnp.attacks.base", "Add"): ("rnp.attacks.base", "AdditiveTrigger"),
    ("rnp.attacks.bpp", "Quantise"): ("rnp.attacks.bpp", "Quantize"),
    ("rnp.attacks.dynamic", "InputAware"): ("rnp.attacks.input_aware", "InputAwareTrigger"),
}
"""Module and class in older trigger files, and what these are called today."""


def save_images(path: Path, data: ImageSet) -> None:
    """Write images, labels and class names to the folder `path`."""
    with atomic_write(path) as draft:
        draft.mkdir()
        save_array(draft / "images.npy", data.images)
        save_array(draft / "labels.npy", data.labels)
        write_json(draft / "meta.json", {"classes": data.classes})


def load_images(path: Path) -> ImageSet:
    """An image set behind a memory map: pages are read when they are used.

    Changes to it stay in memory.

    Raises: UserError when files are missing or damaged.
    """
    meta = read_json(path / "meta.json")
    images = load_array(path / "images.npy")
    labels = load_array(path / "labels.npy")
    if len(images) != len(labels):
        raise UserError(f"{path} holds {len(images)} images but {len(labels)} labels; make it anew")
    if (images.dtype, images.dim(), labels.dtype, labels.dim()) != (torch.uint8, 4, torch.int64, 1):
        raise UserError(
            f"{path} holds {images.dtype} {list(images.shape)} with {labels.dtype} labels, not"
            " uint8 [n, c, h, w] with int64; make it anew"
        )
    classes = tuple(meta.get("classes", ()))
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(
            f"{path} has labels from {labels.min()} to {labels.max()}, but {len(classes)} classes;"
            " make it anew"
        )
    return ImageSet(images, labels, classes)


def save_array(path: Path, values: Tensor) -> None:
    """Write a tensor as a NumPy file."""
    np.save(path, values.numpy(), allow_pickle=False)


def load_array(path: Path) -> Tensor:
    """A NumPy file as a tensor behind a memory map.

    Raises: UserError when it is missing or damaged.
    """
    try:
        # reads neither pickles nor zip archives, as `np.load` would
        return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    except FileNotFoundError:
        raise missing_file_error(path) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); make it anew") from error


def save_defense_set(path: Path, data: DefenseSet) -> None:
    """Write both parts to the folder `path`."""
    with atomic_write(path) as draft:
        save_images(draft / "train", data.train)
        save_images(draft / "val", data.val)


def load_defense_set(path: Path) -> DefenseSet:
    """A defense set behind memory maps.

    Raises: UserError when files are missing or damaged.
    """
    return DefenseSet(load_images(path / "train"), load_images(path / "val"))


def save_trigger(path: Path, trigger: Trigger) -> None:
    """Write the buffers of a trigger, and the names of its class and module."""
    kind = type(trigger)
    meta = {"kind": "trigger", "module": kind.__module__, "class": kind.__name__}
    save_tensors(path, dict(trigger.named_buffers()), meta)


def load_trigger(path: Path) -> Trigger:
    """A trigger, also from a file that older versions wrote.

    Raises: UserError when the file names no trigger class of an attack.
    """
    buffers, meta = load_tensors(path)
    name = str(meta.get("module")), str(meta.get("class"))
    module, cls = RENAMED_TRIGGERS.get(name, name)
    if meta.get("kind") != "trigger" or not module.startswith("rnp.attacks."):
        raise UserError(f"{path} holds {meta.get('kind')!r}, not a trigger")
    try:
        kind = getattr(importlib.import_module(module), cls)
        if not issubclass(kind, Trigger):
            raise TypeError(f"{kind.__name__} is no trigger")
        return kind(**buffers)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"{path} names no trigger of this version of rnp: {error}") from error


def save_poisoned(path: Path, poisoned: PoisonedSet, attack: dict[str, object]) -> None:
    """Write the changes, the trigger, and name and hyperparameters of the attack, for `train`."""
    with atomic_write(path) as draft:
        draft.mkdir()
        for name in ("positions", "images", "labels", "covers"):
            save_array(draft / f"{name}.npy", getattr(poisoned, name))
        save_trigger(draft / "trigger.safetensors", poisoned.trigger)
        write_json(draft / "attack.json", attack)


def load_poisoned(path: Path) -> tuple[PoisonedSet, dict[str, Any]]:
    """The changes to the training set, and name and hyperparameters of the attack.

    Raises: UserError when files are missing or damaged.
    """
    attack = read_json(path / "attack.json")
    poisoned = PoisonedSet(
        positions=load_array(path / "positions.npy"),
        images=load_array(path / "images.npy"),
        labels=load_array(path / "labels.npy"),
        covers=load_array(path / "covers.npy"),
        trigger=load_trigger(path / "trigger.safetensors"),
    )
    options = {
        name: tuple(value) if isinstance(value, list) else value for name, value in attack.items()
    }
    return poisoned, options
