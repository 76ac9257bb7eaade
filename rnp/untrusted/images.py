"""Clean images from a folder, a table or torchvision, with labels that fit the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from rnp.data.base import interleave
from rnp.data.imagefolder import ENDINGS, Unreadable, read_image
from rnp.errors import UserError
from rnp.models.names import TORCHVISION
from rnp.training.predict import predict
from rnp.types import Bytes, Indices, Labels, allocate_images

Label = str | int | None
"""A class name, a class index, or unknown."""


class LabeledFile(NamedTuple):
    """An image file and the label that its folder or table gives it."""

    path: Path
    label: Label


@dataclass(frozen=True)
class CleanImages:
    """Decoded images in random order.

    `labels` are class names, class indices, or None; `skipped` has a line for each file that was
    not read.
    """

    images: Bytes
    labels: list[str] | list[int] | None
    skipped: list[str]


def load_clean_images(source: str, *, size: int, limit: int, rng: torch.Generator) -> CleanImages:
    """At most `limit` images of `source`, evenly from its classes, cut to squares of `size` pixels.

    `source` is a folder with a folder per class, a folder of images, a table (.csv, .parquet) of
    path and, if known, label, or `torchvision:NAME`, which is looked for in `RNP_DATA`.

    Drawn at random: which images, and their order.

    Raises: UserError when there is no such source, or nothing readable in it.
    """
    if source.startswith(TORCHVISION):
        return from_torchvision(source.removeprefix(TORCHVISION), size, limit, rng)
    files, skipped = list_images(source)
    labels = [file.label for file in files]
    if any(label is None for label in labels) != all(label is None for label in labels):
        raise UserError(
            f"{source}: some images have a label and some have none; label all of them or none"
        )
    names = sorted(set(map(str, labels)))
    indices = torch.tensor([names.index(str(label)) for label in labels], dtype=torch.int64)
    order = interleave(indices, len(names), rng).tolist()
    candidates = [files[position] for position in order]
    decoded, images, unreadable = decode(source, candidates, size, limit, skipped)
    known: Any = [file.label for file in decoded if file.label is not None]
    return CleanImages(images, known or None, unreadable)


def load_images_in_order(source: str, *, size: int) -> tuple[list[Path], Bytes, list[str]]:
    """All images of a folder or a table, in its order: paths, images, and lines on skipped files.

    Raises: UserError as `load_clean_images` does.
    """
    files, skipped = list_images(source)
    decoded, images, unreadable = decode(source, files, size, len(files), skipped)
    return [file.path for file in decoded], images, unreadable


def decode(
    source: str, files: Sequence[LabeledFile], size: int, limit: int, skipped: Sequence[str]
) -> tuple[list[LabeledFile], Bytes, list[str]]:
    """The first `limit` readable files, their images, and `skipped` with the unreadable ones.

    Raises: UserError when no file is readable.
    """
    images = allocate_images(min(limit, len(files)), 3, size, size)
    decoded: list[LabeledFile] = []
    unreadable = list(skipped)
    for file in files:
        if len(decoded) == limit:
            break
        try:
            images[len(decoded)] = read_image(file.path, size)
            decoded.append(file)
        except Unreadable as error:
            unreadable.append(f"{file.path}: {error}")
    if not decoded:
        example = f": {unreadable[0]}" if unreadable else ""
        raise UserError(f"{source} holds no readable image{example}")
    return decoded, images[: len(decoded)], unreadable


def list_images(source: str) -> tuple[list[LabeledFile], list[str]]:
    """The image files of a folder or a table, and a line for each that is skipped."""
    path = Path(source)
    if path.is_dir():
        return list_folder(path)
    if path.suffix.lower() in (".csv", ".parquet") and path.is_file():
        return list_table(path), []
    raise UserError(
        f"{source} is no folder and no .csv or .parquet file of paths; torchvision:NAME takes a"
        " data set"
    )


def list_folder(folder: Path) -> tuple[list[LabeledFile], list[str]]:
    """The images in the folders of the classes, or, if there are none, in the folder itself.

    Links that lead out of the folder are skipped.
    """
    subfolders = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    places: list[tuple[Path, Label]] = [(subfolder, subfolder.name) for subfolder in subfolders]
    files: list[LabeledFile] = []
    skipped: list[str] = []
    for place, label in places or [(folder, None)]:
        for file in sorted(place.iterdir()):
            if file.name.startswith(".") or file.suffix.lower() not in ENDINGS:
                continue
            if file.resolve().is_relative_to(folder.resolve()):
                files.append(LabeledFile(file, label))
            else:
                skipped.append(f"{file}: a link that leads out of the folder")
    if not files:
        raise UserError(
            f"{folder} holds no images ({', '.join(sorted(ENDINGS))}), neither itself nor in a"
            " folder per class"
        )
    return files, skipped


def list_table(table: Path) -> list[LabeledFile]:
    """The rows of a table: `path`, relative to the table's folder, and `label`, if it is known."""
    import pandas

    is_parquet = table.suffix.lower() == ".parquet"
    try:
        rows = pandas.read_parquet(table) if is_parquet else pandas.read_csv(table)
    except (ValueError, OSError) as error:
        raise UserError(f"{table} is no readable table: {error}") from error
    if "path" not in rows.columns or rows.empty:
        raise UserError(
            f"{table} has no column path, or no rows; its columns are"
            f" {', '.join(map(str, rows.columns))}"
        )
    paths = rows["path"].astype(str).tolist()
    labels = read_labels(table, rows["label"].tolist()) if "label" in rows.columns else []
    return [
        LabeledFile(table.parent / path, label)
        for path, label in zip(paths, labels or [None] * len(paths))
    ]


def read_labels(table: Path, values: list[Any]) -> list[Label]:
    """Class indices as whole numbers, class names as text; empty when no row has a label.

    Raises: UserError when only some rows have one.
    """
    import pandas

    missing = [bool(pandas.isna(value)) for value in values]
    if all(missing):
        return []
    if any(missing):
        raise UserError(
            f"{table}: some rows have a label and some have none; label all of them or none"
        )
    return [int(value) if isinstance(value, int) else str(value) for value in values]


def from_torchvision(name: str, size: int, limit: int, rng: torch.Generator) -> CleanImages:
    """Images of the test part of a data set of torchvision, which must be downloaded already.

    Raises: UserError when there is no such data set, or not in `RNP_DATA`.
    """
    from torchvision.transforms import functional

    data = open_torchvision(name)
    order = torch.randperm(len(data), generator=rng)[:limit].tolist()
    images = allocate_images(len(order), 3, size, size)
    labels = []
    for row, position in enumerate(order):
        image, label = data[position]
        resized = functional.resize(image.convert("RGB"), [size])
        images[row] = functional.pil_to_tensor(functional.center_crop(resized, [size, size]))
        labels.append(int(label))
    return CleanImages(images, labels, [])


def open_torchvision(name: str) -> Any:
    """The test part of a data set; its constructors name that part in different ways."""
    from torchvision import datasets

    kind = getattr(datasets, name, None)
    if not isinstance(kind, type):
        raise UserError(f"torchvision has no data set {name!r}")
    root = os.environ.get("RNP_DATA") or "data"
    failure = ""
    for part in ({"train": False}, {"split": "test"}, {"split": "val"}, {}):
        try:
            return cast(Any, kind)(root, **part)
        except (TypeError, ValueError) as error:  # another signature
            failure = str(error)
        except (RuntimeError, OSError) as error:
            raise UserError(f"torchvision:{name} is not in {root}: {error}") from error
    raise UserError(f"torchvision:{name} cannot be opened with its folder alone: {failure}")


def map_labels_to_outputs(
    clean: CleanImages, named: Sequence[str], num_classes: int
) -> tuple[Labels | None, tuple[str, ...]]:
    """The labels as indices of the model's outputs, and the names of the outputs.

    `named` are these names, if they are known.

    Raises: UserError when labels, names and outputs do not fit each other; nothing is guessed.
    """
    if named and len(named) != num_classes:
        raise UserError(
            f"the model has {num_classes} outputs, but {len(named)} classes are named; name all, in"
            " the order of the outputs"
        )
    names = tuple(named) or tuple(map(str, range(num_classes)))
    labels = clean.labels
    if labels is None:
        return None, names
    if isinstance(labels[0], str):
        return map_names_to_outputs(cast("list[str]", labels), named, num_classes)
    indices = cast("list[int]", labels)
    highest, lowest = max(indices), min(indices)
    if not 0 <= lowest <= highest < num_classes:
        raise UserError(
            f"labels go from {lowest} to {highest}, the model's outputs from 0 to {num_classes - 1}"
        )
    return torch.tensor(indices), names


def map_names_to_outputs(
    labels: list[str], named: Sequence[str], num_classes: int
) -> tuple[Labels, tuple[str, ...]]:
    """`map_labels_to_outputs` for class names; without `named` they are in alphabetical order."""
    present = sorted(set(labels))
    names = tuple(named) or tuple(present)
    if len(names) != num_classes:
        raise UserError(
            f"the model has {num_classes} outputs, the images {len(present)} classes"
            f" ({', '.join(present[:5])} ...); name all classes in the order of the outputs:"
            " --class-names cat,dog,... or a file with one name per line"
        )
    unknown = [name for name in present if name not in names]
    if unknown:
        raise UserError(
            f"images of class {unknown[0]!r}, which is not among the named ones:"
            f" {', '.join(names[:10])}"
        )
    return torch.tensor([names.index(label) for label in labels]), names


def pseudo_labels(model: nn.Module, images: Bytes, confidence: float) -> tuple[Indices, Indices]:
    """Positions of the images that the model is confident about, and its predictions for them."""
    probability, predicted = predict(model, images).softmax(1).max(1)
    confident = (probability >= confidence).nonzero().squeeze(1)
    return confident, predicted[confident]
