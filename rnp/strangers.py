"""A stranger's model and images, brought into the form that every other part of rnp works with."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rnp.data.base import interleave
from rnp.data.imagefolder import ENDINGS, Unreadable, read_image
from rnp.errors import UserError
from rnp.io import META, load_state, load_tensors
from rnp.models.build import Architecture, typed
from rnp.models.classifier import Classifier, settle
from rnp.models.names import TIMM, TORCHVISION
from rnp.quarantine import Converted, convert
from rnp.training import default_device, predict
from rnp.types import Bytes, Indices, Labels, room

IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # what torchvision's and timm's networks are mostly fed with
FEWEST = 20  # images that a repair can be built on at all


@dataclass(frozen=True)
class Adopted:
    """A stranger's classifier. `whole` says that the file's names are those of `model`; else they
    are those of `model.net`.
    """

    model: Classifier
    architecture: Architecture
    classes: tuple[str, ...]  # that the file names; empty when it names none
    whole: bool
    converted: Converted

    def named(self, model: Classifier) -> dict[str, Tensor]:
        """The weights of a repaired copy, under the names that the stranger's own code knows."""
        return model.state_dict() if self.whole else model.net.state_dict()


def adopt(
    path: Path,
    *,
    arch: str = "",
    width: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Adopted:
    """Read the weights in `path` through the quarantine; every name, shape and dtype must be the
    architecture's.

    A file that `rnp` wrote says itself of which architecture and normalisation it is.

    Raises: UserError when the file is refused, when it does not fit, or when something has to be
    said.
    """
    with tempfile.TemporaryDirectory() as folder:
        converted = convert(path, Path(folder) / "weights.safetensors")
        state, _ = load_tensors(Path(folder) / "weights.safetensors")
    said = own_words(path)
    typed(arch)
    if not arch and not isinstance(said.get("arch"), str):
        raise UserError(
            f"{path} does not say of which architecture it is; name it, as in --arch resnet18"
        )
    architecture = Architecture(
        arch=arch or said["arch"], width=width or (0 if arch else int(said.get("width", 0)))
    )
    whole = {"mean", "std"} < state.keys() and all(
        name.startswith("net.") for name in state.keys() - {"mean", "std"}
    )
    if whole:
        mean, std = state["mean"].flatten(), state["std"].flatten()
    elif mean and std:
        mean, std = torch.tensor(mean), torch.tensor(std)
    elif architecture.arch.startswith((TORCHVISION, TIMM)):
        mean, std = map(torch.tensor, IMAGENET)
    else:
        raise UserError(
            "say how the model's inputs, in [0, 1], are normalised: --mean .5,.5,.5 --std"
            " .25,.25,.25, or --mean 0,0,0 --std 1,1,1 where they are not"
        )
    if len(mean) != len(std) or not (std > 0).all():
        raise UserError(
            f"--mean and --std need a number per channel, those of --std above 0; got {len(mean)}"
            f" and {len(std)}"
        )
    net = {
        name.removeprefix("net."): value
        for name, value in state.items()
        if not (whole and name in ("mean", "std"))
    }

    def build(k):
        return architecture.build(k, len(mean), mean, std, rng=torch.Generator())

    model = build(outputs(build, net, str(path)))
    own = model.net.state_dict()
    odd = next(
        (name for name in own.keys() & net.keys() if own[name].dtype != net[name].dtype), None
    )
    if odd:
        raise UserError(
            f"{path}: tensor {odd!r} is {net[odd].dtype}, the architecture needs {own[odd].dtype};"
            " convert the weights"
        )
    load_state(model.net, net, f"{path} ({architecture.arch})")
    classes = tuple(map(str, said["classes"])) if isinstance(said.get("classes"), list) else ()
    return Adopted(model.to(default_device()).eval(), architecture, classes, whole, converted)


def own_words(path: Path) -> dict:
    """What a file that rnp wrote says of itself: text, which is checked like anything that is
    typed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(META, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return said if isinstance(said, dict) and said.get("kind") == "model" else {}


def outputs(build: Callable[[int], Classifier], state: dict[str, Tensor], what: str) -> int:
    """The number of classes: the first side of the tensors by which a network of three classes
    differs from `state`.

    Raises: UserError when they do not agree on one.
    """
    probe = build(3).net.state_dict()
    sizes = {
        len(state[name])
        for name, value in probe.items()
        if name in state
        and value.dim()
        and len(value) == 3
        and state[name].shape[1:] == value.shape[1:]
        and len(state[name]) != 3
    }
    if len(sizes) > 1:
        raise UserError(
            f"{what} has heads of {', '.join(map(str, sorted(sizes)))} classes; rnp repairs"
            " classifiers with one head"
        )
    return sizes.pop() if sizes else 3


def output_size(model: Classifier, side: int) -> int:
    """The number of outputs for images of that side; with two of them the network is looked at and
    laid out.

    Raises: UserError as `settle` does.
    """
    images = torch.zeros(2, len(model.mean.flatten()), side, side)
    return predict(settle(model, images.to(model.mean.device)), images).shape[1]


class Found(NamedTuple):
    """An image file and what it is said to show: a class name, a class index, or nothing."""

    path: Path
    label: str | int | None


@dataclass(frozen=True)
class Gathered:
    """Decoded images in random order. `labels` are class names, class indices, or None; `skipped`
    tells of other files.
    """

    images: Bytes
    labels: list[str] | list[int] | None
    skipped: list[str]


def gather(source: str, *, size: int, limit: int, rng: torch.Generator) -> Gathered:
    """At most `limit` images of `source`, evenly over its classes, cut to a square of `size`
    pixels.

    `source` is a folder with a folder per class, a folder of images, a table (.csv, .parquet) of
    path and, if known, label, or `torchvision:NAME`, which is looked for where `RNP_DATA` says.
    Drawn at random: which images, and their order.

    Raises: UserError when there is no such thing, or nothing readable in it.
    """
    if source.startswith(TORCHVISION):
        return from_torchvision(source.removeprefix(TORCHVISION), size, limit, rng)
    found, skipped = listed(source)
    labels = [each.label for each in found]
    if any(label is None for label in labels) != all(label is None for label in labels):
        raise UserError(
            f"{source}: some images have a label and some have none; label all of them or none"
        )
    names = sorted(set(map(str, labels)))
    order = interleave(
        torch.tensor([names.index(str(label)) for label in labels], dtype=torch.int64),
        len(names),
        rng,
    ).tolist()
    kept, images = [], room(min(limit, len(order)), 3, size, size)
    for position in order:
        if len(kept) == limit:
            break
        try:
            images[len(kept)] = read_image(found[position].path, size)
            kept.append(labels[position])
        except Unreadable as error:
            skipped.append(f"{found[position].path}: {error}")
    if not kept:
        raise UserError(f"{source} holds no readable image{f': {skipped[0]}' if skipped else ''}")
    return Gathered(images[: len(kept)], None if kept[0] is None else kept, skipped)


def in_order(source: str, *, size: int) -> tuple[list[Path], Bytes, list[str]]:
    """All images of a folder or a table, in its order: their paths, the images, and what was
    skipped.

    Raises: UserError as `gather` does.
    """
    found, skipped = listed(source)
    kept, images = [], room(len(found), 3, size, size)
    for each in found:
        try:
            images[len(kept)] = read_image(each.path, size)
            kept.append(each.path)
        except Unreadable as error:
            skipped.append(f"{each.path}: {error}")
    if not kept:
        raise UserError(f"{source} holds no readable image: {skipped[0]}")
    return kept, images[: len(kept)], skipped


def listed(source: str) -> tuple[list[Found], list[str]]:
    """The image files of a folder or a table, and what was skipped."""
    path = Path(source)
    if path.is_dir():
        return in_folder(path)
    if path.suffix.lower() in (".csv", ".parquet") and path.is_file():
        return in_table(path), []
    raise UserError(
        f"{source} is no folder and no .csv or .parquet file of paths; torchvision:NAME takes a"
        " data set"
    )


def in_folder(folder: Path) -> tuple[list[Found], list[str]]:
    """Images in the folders of their classes, or, where no folder holds any, those in the folder
    itself.
    """
    classes = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    found, skipped = [], []
    for place, label in [(each, each.name) for each in classes] or [(folder, None)]:
        for file in sorted(place.iterdir()):
            if file.name.startswith(".") or file.suffix.lower() not in ENDINGS:
                continue
            if file.resolve().is_relative_to(folder.resolve()):
                found.append(Found(file, label))
            else:
                skipped.append(f"{file}: a link that leads out of the folder")
    if not found:
        raise UserError(
            f"{folder} holds no images ({', '.join(sorted(ENDINGS))}), neither itself nor in a"
            " folder per class"
        )
    return found, skipped


def in_table(table: Path) -> list[Found]:
    """The rows of a table: `path`, from the table's folder, and `label`, a class name or index,
    which may be missing.
    """
    import pandas

    try:
        rows = (
            pandas.read_parquet(table)
            if table.suffix.lower() == ".parquet"
            else pandas.read_csv(table)
        )
    except (ValueError, OSError) as error:
        raise UserError(f"{table} is no readable table: {error}") from error
    if "path" not in rows.columns or rows.empty:
        raise UserError(
            f"{table} has no column path, or no rows; its columns are"
            f" {', '.join(map(str, rows.columns))}"
        )
    labels = [None] * len(rows)
    if "label" in rows.columns:
        if rows["label"].isna().any() and not rows["label"].isna().all():
            raise UserError(
                f"{table}: some rows have a label and some have none; label all of them or none"
            )
        if not rows["label"].isna().any():
            labels = [
                int(label) if isinstance(label, int) else str(label)
                for label in rows["label"].tolist()
            ]
    return [
        Found(table.parent / path, label) for path, label in zip(rows["path"].astype(str), labels)
    ]


def from_torchvision(name: str, size: int, limit: int, rng: torch.Generator) -> Gathered:
    """Images of the test part of one of torchvision's data sets, which must lie there already."""
    from torchvision import datasets
    from torchvision.transforms import functional

    if not isinstance(getattr(datasets, name, None), type):
        raise UserError(f"torchvision has no data set {name!r}")
    root, failures = os.environ.get("RNP_DATA") or "data", []
    for part in ({"train": False}, {"split": "test"}, {"split": "val"}, {}):
        try:
            data = getattr(datasets, name)(root, **part)
            break
        except (TypeError, ValueError) as error:  # another signature
            failures.append(str(error))
        except (RuntimeError, OSError) as error:
            raise UserError(f"torchvision:{name} is not in {root}: {error}") from error
    else:
        raise UserError(
            f"torchvision:{name} cannot be opened with its folder alone: {failures[-1]}"
        )
    order = torch.randperm(len(data), generator=rng)[:limit].tolist()
    images, labels = room(len(order), 3, size, size), []
    for row, position in enumerate(order):
        image, label = data[position]
        image = functional.center_crop(functional.resize(image.convert("RGB"), size), [size, size])
        images[row] = functional.pil_to_tensor(image)
        labels.append(int(label))
    return Gathered(images, labels, [])


def on_the_head(
    gathered: Gathered, named: Sequence[str], k: int
) -> tuple[Labels | None, tuple[str, ...]]:
    """Labels as indices of the model's `k` outputs, and the outputs' names. `named` are those
    names, if they are known.

    Raises: UserError when names and outputs do not match; nothing is guessed where the numbers
    differ.
    """
    if named and len(named) != k:
        raise UserError(
            f"the model has {k} outputs, but {len(named)} classes are named; name all, in the order"
            " of the outputs"
        )
    if gathered.labels is None:
        return None, tuple(named) or tuple(map(str, range(k)))
    if isinstance(gathered.labels[0], int):
        highest, lowest = max(gathered.labels), min(gathered.labels)
        if not 0 <= lowest <= highest < k:
            raise UserError(
                f"labels go from {lowest} to {highest}, the model's outputs from 0 to {k - 1}"
            )
        return torch.tensor(gathered.labels), tuple(named) or tuple(map(str, range(k)))
    own = sorted(set(gathered.labels))
    names = tuple(named) or tuple(own)
    if len(names) != k:
        raise UserError(
            f"the model has {k} outputs, the images {len(own)} classes ({', '.join(own[:5])} ...);"
            " name all classes in the order of the outputs: --classes cat,dog,... or a file with"
            " one name a line"
        )
    strange = [name for name in own if name not in names]
    if strange:
        raise UserError(
            f"images of class {strange[0]!r}, which is not among the named ones:"
            f" {', '.join(names[:10])}"
        )
    return torch.tensor([names.index(label) for label in gathered.labels]), names


def confident(model: nn.Module, images: Bytes, confidence: float) -> tuple[Indices, Tensor]:
    """Positions of the images that the model itself is sure of, and what it says they show."""
    probability, label = predict(model, images).softmax(1).max(1)
    sure = (probability >= confidence).nonzero().squeeze(1)
    return sure, label[sure]
