"""Files: every one appears whole or not at all, weights travel as safetensors, and nothing here
reads or writes a pickle.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnp.attacks.base import Poisoned
from rnp.errors import UserError
from rnp.models.build import Architecture
from rnp.models.classifier import Classifier
from rnp.models.parallel import leads
from rnp.training import default_device
from rnp.types import DefenceSet, Epoch, ImageSet, NeuronMask, Trigger

# the one metadata key: safetensors writes several in random order, and files must repeat byte for
# byte
META = "rnp"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file or folder to; it takes the place of `path` when the
    block ends well.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with whole(path) as draft:
        draft.write_text(text)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise missing(path) from None
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object with names")
    return value


def missing(path: Path) -> UserError:
    return UserError(f"{path} does not exist; run the stage that writes it, or check the path")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class History:
    """A CSV that grows by one row per epoch or step, flushed at once; `listeners` hear every row
    of this process.
    """

    listeners: list[Callable[[dict[str, float]], None]] = []

    def __init__(self, path: Path | None) -> None:
        self.path, self.file = path if leads() else None, None

    def __call__(self, epoch: Epoch) -> None:
        row = epoch.row()
        for listener in self.listeners:
            listener(row)
        if self.path is None:
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("w", newline="")
            self.writer = csv.DictWriter(self.file, row, lineterminator="\n")
            self.writer.writeheader()
        self.writer.writerow({key: f"{value:.6g}" for key, value in row.items()})
        self.file.flush()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def write_rows(path: Path, rows: list[dict]) -> None:
    with whole(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def put_rows(
    path: Path, rows: list[dict[str, object]], columns: Sequence[str], key: Sequence[str]
) -> None:
    """Add rows to a table of results, sorted by `key`, in place of older ones with the same key.

    Raises: UserError when the table there has other columns.
    """
    old = read_rows(path) if path.exists() else []
    if old and list(old[0]) != list(columns):
        raise UserError(f"{path} has other columns than rows of this version; write to a new file")

    def identity(row):
        return [str(row[name]) for name in key]

    taken = [identity(row) for row in rows]
    write_rows(
        path, sorted([*rows, *(row for row in old if identity(row) not in taken)], key=identity)
    )


def read_trajectory(path: Path) -> list[Epoch]:
    """The rows of a history, as `Epoch.row` wrote them."""
    rows = []
    for row in read_rows(path):
        own = {
            f.name: (int if f.name in ("epoch", "step") else float)(row.pop(f.name))
            for f in dataclasses.fields(Epoch)
            if f.name != "extra"
        }
        rows.append(Epoch(**own, extra={key: float(value) for key, value in row.items()}))
    return rows


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """safetensors with one JSON text as metadata: the same tensors give the same bytes."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole(path) as draft:
        save_file(flat, draft, metadata={META: json.dumps(meta, sort_keys=True)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata.

    Raises: UserError when the file is missing, damaged, or none of ours.
    """
    if not path.is_file():
        raise missing(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(META, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no readable safetensors file ({error}); make it anew"
        ) from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} was not written by rnp: it does not say what it holds")
    return tensors, meta


def save_model(
    path: Path, model: Classifier, architecture: Architecture, classes: tuple[str, ...]
) -> None:
    layout = {"plain_because": model.plain_because} if model.plain_because else {}
    save_tensors(
        path,
        model.state_dict(),
        {"kind": "model", "classes": classes, **dataclasses.asdict(architecture), **layout},
    )


def load_model(path: Path) -> tuple[Classifier, Architecture, tuple[str, ...]]:
    """The model in eval mode on the default device, its architecture and class names.

    Raises: UserError when the file holds no model, or weights that do not fit the architecture
    that it names.
    """
    state, meta = load_tensors(path)
    if meta.get("kind") != "model":
        raise UserError(f"{path} holds {meta.get('kind')!r}, not a model")
    if not all(
        isinstance(meta.get(key), kind)
        for key, kind in (("arch", str), ("width", int), ("classes", list))
    ):
        raise UserError(f"{path} does not say of which architecture and classes it is")
    try:
        architecture = Architecture(arch=meta["arch"], width=meta["width"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    mean, std = (
        state.get("mean", torch.zeros(3)).flatten(),
        state.get("std", torch.ones(3)).flatten(),
    )
    model = architecture.build(len(meta["classes"]), len(mean), mean, std, rng=torch.Generator())
    load_state(model, state, f"{path} ({architecture.arch}, width {architecture.width})")
    if isinstance(reason := meta.get("plain_because"), str):
        model.lay_out(reason)
    return model.to(default_device()).eval(), architecture, tuple(meta["classes"])


def load_state(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Copy weights into `model`; every name and shape must fit.

    Raises: UserError naming the first one that does not.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own:
            where = "lacks" if name in own else "has an unexpected"
            raise UserError(
                f"{what} {where} tensor {name!r}: the checkpoint is of another architecture"
            )
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{what}: tensor {name!r} is {list(state[name].shape)}, the architecture needs"
                f" {list(own[name].shape)}"
            )
    model.load_state_dict(state)


def save_images(path: Path, data: ImageSet) -> None:
    with whole(path) as draft:
        draft.mkdir()
        save_array(draft / "images.npy", data.images)
        save_array(draft / "labels.npy", data.labels)
        write_json(draft / "meta.json", {"classes": data.classes})


def load_images(path: Path) -> ImageSet:
    """An image set behind a memory map: pages are read when they are used, and changes stay in
    memory.

    Raises: UserError when files are missing or damaged.
    """
    meta = read_json(path / "meta.json")
    images, labels = load_array(path / "images.npy"), load_array(path / "labels.npy")
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
    np.save(path, values.numpy(), allow_pickle=False)


def load_array(path: Path) -> Tensor:
    try:
        return torch.from_numpy(
            np.lib.format.open_memmap(path, mode="c")
        )  # reads no pickle and no zip, as np.load would
    except FileNotFoundError:
        raise missing(path) from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); make it anew") from error


def save_defence_set(path: Path, data: DefenceSet) -> None:
    with whole(path) as draft:
        save_images(draft / "train", data.train)
        save_images(draft / "val", data.val)


def load_defence_set(path: Path) -> DefenceSet:
    return DefenceSet(load_images(path / "train"), load_images(path / "val"))


def save_trigger(path: Path, trigger: Trigger) -> None:
    kind = type(trigger)
    save_tensors(
        path,
        dict(trigger.named_buffers()),
        {"kind": "trigger", "module": kind.__module__, "class": kind.__name__},
    )


def load_trigger(path: Path) -> Trigger:
    """Raises: UserError when the file names no trigger class of an attack."""
    buffers, meta = load_tensors(path)
    module = str(meta.get("module"))
    if meta.get("kind") != "trigger" or not module.startswith("rnp.attacks."):
        raise UserError(f"{path} holds {meta.get('kind')!r}, not a trigger")
    try:
        kind = getattr(importlib.import_module(module), str(meta.get("class")))
        if not issubclass(kind, Trigger):
            raise TypeError(f"{kind.__name__} is no trigger")
        return kind(**buffers)
    except (ImportError, AttributeError, TypeError) as error:
        raise UserError(f"{path} names no trigger of this version of rnp: {error}") from error


def save_poisoned(path: Path, poisoned: Poisoned, attack: dict) -> None:
    """`attack` holds the name and the fields of the attack, which the training stage needs
    again.
    """
    with whole(path) as draft:
        draft.mkdir()
        for name in ("positions", "images", "labels", "covers"):
            save_array(draft / f"{name}.npy", getattr(poisoned, name))
        save_trigger(draft / "trigger.safetensors", poisoned.trigger)
        write_json(draft / "attack.json", attack)


def load_poisoned(path: Path) -> tuple[Poisoned, dict]:
    parts = [
        load_array(path / f"{name}.npy") for name in ("positions", "images", "labels", "covers")
    ]
    attack = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in read_json(path / "attack.json").items()
    }
    return Poisoned(*parts, load_trigger(path / "trigger.safetensors")), attack


def save_mask(path: Path, mask: NeuronMask) -> None:
    save_tensors(path, mask, {"kind": "mask", "layers": list(mask)})


def load_mask(path: Path) -> NeuronMask:
    """The mask with its layers in the order in which they were saved, at full precision."""
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "mask":
        raise UserError(f"{path} holds {meta.get('kind')!r}, not a neuron mask")
    layers = meta.get("layers")
    if not isinstance(layers, list) or set(map(str, layers)) != tensors.keys():
        raise UserError(f"{path} lacks layers of the mask, or holds others; make it anew")
    return {layer: tensors[layer] for layer in layers}


def mask_rows(mask: NeuronMask, model: torch.nn.Module) -> list[dict]:
    """One row per neuron, for people: layer, index, mask, and the scale (of a kernel the norm) and
    bias of its channel.
    """
    rows = []
    for layer, values in mask.items():
        module = model.get_submodule(layer)
        scales = (
            module.weight.detach()
            if module.weight.dim() == 1
            else module.weight.detach().flatten(1).norm(dim=1)
        )
        biases = getattr(module, "bias", None)
        biases = torch.zeros_like(scales) if biases is None else biases
        rows += [
            {
                "layer": layer,
                "index": i,
                "mask": f"{m:.6f}",
                "scale": f"{s:.6g}",
                "bias": f"{b:.6g}",
            }
            for i, (m, s, b) in enumerate(zip(values.tolist(), scales.tolist(), biases.tolist()))
        ]
    return rows
