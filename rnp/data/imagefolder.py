"""A folder of images: train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png split by the seed."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Interval
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rnp.data.base import Dataset, interleave
from rnp.errors import UserError
from rnp.types import Bytes, ImageSet, Labels, allocate_images

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}
FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "GIF",
    "WEBP",
    "PPM",
    "TIFF",
)  # others, such as EPS, start programs
MOST_PIXELS = 50_000_000
SPAN = 32  # files that a worker takes at a time


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Dataset):
    """Any images, one folder per class; `RNP_WORKERS` threads decode them into memory maps, so
    that memory stays small.

    Each is turned upright, converted to RGB, its shorter side resized to `size`, and its middle
    cut out. Drawn at random: which images form the test set, where the folder does not say.
    """

    path: Annotated[str, "the folder, relative to where data sets lie, or absolute"] = "images"
    size: Annotated[int, Ge(8), "side of the square images that are made, in pixels"] = 64
    test_share: Annotated[
        float,
        Interval(gt=0, lt=1),
        "share of the images that form the test set, where there are no train and test folders",
    ] = 0.2

    def load(self, root: Path, *, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        folder = root / self.path
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; set datasets.imagefolder.path")
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            train, test = scan(folder / "train"), scan(folder / "test")
            if train.keys() != test.keys():
                odd = sorted(train.keys() ^ test.keys())
                raise UserError(
                    f"{folder}: class folders {', '.join(odd)} are in train or in test only"
                )
            classes, parts = tuple(train), [listed(train), listed(test)]
        else:
            found = scan(folder)
            classes, (files, labels) = tuple(found), listed(found)
            order = interleave(labels, len(classes), rng)
            cut = round(len(order) * self.test_share)
            if cut == 0:
                raise UserError(
                    f"{folder} holds {len(order)} images, too few to set {self.test_share:g} of"
                    " them aside for the test"
                )
            chosen = order[cut:].sort().values, order[:cut].sort().values
            parts = [
                ([files[i] for i in positions.tolist()], labels[positions]) for positions in chosen
            ]
        images = decode([files for files, _ in parts], self.size)
        train, test = (ImageSet(each, labels, classes) for each, (_, labels) in zip(images, parts))
        return train, test


def decode(parts: Sequence[Sequence[Path]], size: int) -> list[Bytes]:
    """The images of each list of files, in its order; every worker holds one of them outside of
    the result.

    Threads, since Pillow works outside of the interpreter's lock: two on two cores were 1.8 times
    as fast as one, about as fast as two processes; each writes where the image belongs.

    Raises: UserError with the number of all files that cannot be read and the names of the first
    three.
    """
    rooms = [allocate_images(len(files), 3, size, size) for files in parts]
    spans = [
        (files[i : i + SPAN], images.numpy()[i : i + SPAN])
        for files, images in zip(parts, rooms)
        for i in range(0, len(files), SPAN)
    ]

    def fill(span: tuple[Sequence[Path], np.ndarray]) -> list[tuple[Path, str]]:
        failed = []
        for file, place in zip(*span):
            try:
                place[:] = pixels(file, size)
            except Unreadable as error:
                failed.append((file, str(error)))
        return failed

    with bombs_refused(), ThreadPoolExecutor(workers()) as pool:
        unreadable = sorted(each for failed in pool.map(fill, spans) for each in failed)
    if unreadable:
        named = "; ".join(f"{file} ({why})" for file, why in unreadable[:3])
        more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        raise UserError(
            f"{len(unreadable)} unreadable image files: {named}{more}; remove or replace them"
        )
    return rooms


def workers() -> int:
    """`RNP_WORKERS`, else the cores that this process may use.

    Raises: UserError when `RNP_WORKERS` is no number above 0.
    """
    wanted = os.environ.get("RNP_WORKERS")
    if not wanted:
        return (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
    if not wanted.isdecimal() or int(wanted) < 1:
        raise UserError(f"RNP_WORKERS={wanted!r} is no number of workers; try 1")
    return int(wanted)


class Unreadable(Exception):
    """Why a file gives no image."""


def read_image(file: Path, size: int) -> UInt8[Tensor, "3 h w"]:
    """The file as [3, size, size]: upright, its shorter side resized, its middle cut out; the
    first frame of several.

    Raises: Unreadable, also for more than `MOST_PIXELS`, which a small file may hold, and for
    formats that are no photograph's.
    """
    with bombs_refused():
        return torch.from_numpy(pixels(file, size))


@contextlib.contextmanager
def bombs_refused() -> Iterator[None]:
    """Pillow's warning of far too many pixels becomes an error. To be entered by one thread, for
    all: filters are shared.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def pixels(file: Path, size: int) -> UInt8[np.ndarray, "3 h w"]:
    """What `read_image` gives.

    JPEGs are decoded at their full size: Pillow's `draft`, which decodes at a half or less, moved
    single pixels by 1 to 4 of 255 and gains nothing for photographs of less than twice `size`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise Unreadable(
                    f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}"
                )
            upright = to_rgb(ImageOps.exif_transpose(image))
    except (
        OSError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
        SyntaxError,
        ValueError,
        EOFError,
    ) as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error
    return np.array(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)).transpose(
        2, 0, 1
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; an alpha channel is dropped."""
    if image.mode.startswith("I;16"):  # Pillow would clip, which turns 16-bit images white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P":  # straight to RGB, a palette with transparency draws a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def listed(files: dict[str, list[Path]]) -> tuple[list[Path], Labels]:
    """All files, class by class, and their labels."""
    labels = [label for label, members in enumerate(files.values()) for _ in members]
    return [file for members in files.values() for file in members], torch.tensor(labels)


def scan(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, both in alphabetical order; hidden files and other endings are passed
    over.

    Raises: UserError when there are fewer than two classes, or a class without images.
    """
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{folder} holds {len(classes)} class folders, at least 2 are needed")
    files = {
        name: sorted(
            f
            for f in (folder / name).iterdir()
            if f.suffix.lower() in ENDINGS and not f.name.startswith(".")
        )
        for name in classes
    }
    empty = [name for name, members in files.items() if not members]
    if empty:
        raise UserError(f"{folder}: no images in class folder {empty[0]!r}")
    return files
