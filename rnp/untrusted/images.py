"""Clean images from a folder, a table or torchvision, with labels that fit the model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rnp.data.base import interleave
from rnp.data.imagefolder import ENDINGS, Unreadable, read_image
from rnp.errors import UserError
from rnp.models.names import TORCHVISION
from rnp.training.predict import predict
from rnp.types import Bytes, Indices, Labels, allocate_images

MIN_IMAGES = 20  # images that a repair can be built on at all


class LabeledFile(NamedTuple):
    """An image file and what it is said to show: a class name, a class index, or nothing."""

    path: Path
    label: str | int | None


@dataclass(frozen=True)
class CleanImages:
    """Decoded images in random order. `labels` are class names, class indices, or None; `skipped`
    tells of other files.
    """

    images: Bytes
    labels: list[str] | list[int] | None
    skipped: list[str]


def load_clean_images(source: str, *, size: int, limit: int, rng: torch.Generator) -> CleanImages:
    """At most `limit` images of `source`, evenly over its classes, cut to a square of `size`
    pixels.

    `source` is a folder with a folder per class, a folder of images, a table (.csv, .parquet) of
    path and, if known, label, or `torchvision:NAME`, which is looked for where `RNP_DATA` says.
    Drawn at random: which images, and their order.

    Raises: UserError when there is no such thing, or nothing readable in it.
    """
    if source.startswith(TORCHVISION):
        return from_torchvision(source.removeprefix(TORCHVISION), size, limit, rng)
    found, skipped = list_images(source)
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
    kept, images = [], allocate_images(min(limit, len(order)), 3, size, size)
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
    return CleanImages(images[: len(kept)], None if kept[0] is None else kept, skipped)


def load_images_in_order(source: str, *, size: int) -> tuple[list[Path], Bytes, list[str]]:
    """All images of a folder or a table, in its order: their paths, the images, and what was
    skipped.

    Raises: UserError as `load_clean_images` does.
    """
    found, skipped = list_images(source)
    kept, images = [], allocate_images(len(found), 3, size, size)
    for each in found:
        try:
            images[len(kept)] = read_image(each.path, size)
            kept.append(each.path)
        except Unreadable as error:
            skipped.append(f"{each.path}: {error}")
    if not kept:
        raise UserError(f"{source} holds no readable image: {skipped[0]}")
    return kept, images[: len(kept)], skipped


def list_images(source: str) -> tuple[list[LabeledFile], list[str]]:
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


def in_folder(folder: Path) -> tuple[list[LabeledFile], list[str]]:
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
                found.append(LabeledFile(file, label))
            else:
                skipped.append(f"{file}: a link that leads out of the folder")
    if not found:
        raise UserError(
            f"{folder} holds no images ({', '.join(sorted(ENDINGS))}), neither itself nor in a"
            " folder per class"
        )
    return found, skipped


def in_table(table: Path) -> list[LabeledFile]:
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
        LabeledFile(table.parent / path, label)
        for path, label in zip(rows["path"].astype(str), labels)
    ]


def from_torchvision(name: str, size: int, limit: int, rng: torch.Generator) -> CleanImages:
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
    images, labels = allocate_images(len(order), 3, size, size), []
    for row, position in enumerate(order):
        image, label = data[position]
        image = functional.center_crop(functional.resize(image.convert("RGB"), size), [size, size])
        images[row] = functional.pil_to_tensor(image)
        labels.append(int(label))
    return CleanImages(images, labels, [])


def map_labels_to_outputs(
    gathered: CleanImages, named: Sequence[str], k: int
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


def pseudo_labels(model: nn.Module, images: Bytes, confidence: float) -> tuple[Indices, Tensor]:
    """Positions of the images that the model itself is sure of, and what it says they show."""
    probability, label = predict(model, images).softmax(1).max(1)
    sure = (probability >= confidence).nonzero().squeeze(1)
    return sure, label[sure]
