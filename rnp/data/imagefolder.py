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

from rnp.data.base import Dataset, digest_files, interleave
from rnp.errors import UserError
from rnp.types import Bytes, ImageSet, Indices, Labels, allocate_images

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")
"""The formats that Pillow may read; others, such as EPS, start programs."""
MAX_PIXELS = 50_000_000
FILES_PER_TASK = 32
"""Files that a thread takes at a time."""

ClassFiles = dict[str, list[Path]]
"""The image files of each class."""


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Dataset):
    """Images of any format and size, one folder per class.

    Each is turned upright, converted to RGB, its shorter side resized to `size`, and its middle
    cut out. `RNP_WORKERS` threads decode into memory maps, so that memory stays bounded.

    Drawn at random: which images form the test set, where there are no train and test folders.
    """

    path: Annotated[str, "the folder, relative to where data sets are, or absolute"] = "images"
    size: Annotated[int, Ge(8), "side of the square images that are made, in pixels"] = 64
    test_share: Annotated[
        float,
        Interval(gt=0, lt=1),
        "share of the images that form the test set, where there are no train and test folders",
    ] = 0.2

    def load(self, root: Path, *, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        scanned = self._scan(root)
        classes = tuple(scanned[0])
        parts = [flatten_classes(files) for files in scanned]
        if len(parts) == 1:
            files, labels = parts[0]
            parts = [
                ([files[i] for i in positions.tolist()], labels[positions])
                for positions in self._split(labels, len(classes), rng)
            ]
        images = decode([files for files, _ in parts], self.size)
        train, test = (
            ImageSet(decoded, labels, classes) for decoded, (_, labels) in zip(images, parts)
        )
        return train, test

    def fingerprint(self, root: Path) -> str:
        """A digest of all image files of the folder."""
        files = [file for part in self._scan(root) for members in part.values() for file in members]
        return digest_files(root / self.path, files)

    def _scan(self, root: Path) -> list[ClassFiles]:
        """The files of the train and of the test folder; where these are absent, all files.

        Raises: UserError when there is no folder, or its classes are unusable.
        """
        folder = root / self.path
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; set datasets.imagefolder.path")
        if not ((folder / "train").is_dir() and (folder / "test").is_dir()):
            return [scan(folder)]
        train = scan(folder / "train")
        test = scan(folder / "test")
        if train.keys() != test.keys():
            unmatched = ", ".join(sorted(train.keys() ^ test.keys()))
            raise UserError(f"{folder}: class folders {unmatched} are in train or in test only")
        return [train, test]

    def _split(self, labels: Labels, classes: int, rng: torch.Generator) -> tuple[Indices, Indices]:
        """Positions of the training and of the test images, each ascending.

        Raises: UserError when the test set would be empty.
        """
        order = interleave(labels, classes, rng)
        cut = round(len(order) * self.test_share)
        if cut == 0:
            raise UserError(
                f"{self.path} holds {len(order)} images, too few to set {self.test_share:g} of"
                " them aside for the test; raise datasets.imagefolder.test_share"
            )
        return order[cut:].sort().values, order[:cut].sort().values


def decode(parts: Sequence[Sequence[Path]], size: int) -> list[Bytes]:
    """The images of each list of files, in its order; a thread holds one of them as a copy.

    Threads, because Pillow releases the interpreter's lock: two on two cores were 1.8 times as
    fast as one, about as fast as two processes. Each writes its images to their final place.

    Raises: UserError with the number of all files that cannot be read and the names of the first
    three.
    """
    decoded = [allocate_images(len(files), 3, size, size) for files in parts]
    tasks = [
        (files[i : i + FILES_PER_TASK], images.numpy()[i : i + FILES_PER_TASK])
        for files, images in zip(parts, decoded)
        for i in range(0, len(files), FILES_PER_TASK)
    ]

    def run(task: tuple[Sequence[Path], np.ndarray]) -> list[tuple[Path, str]]:
        failures = []
        for file, place in zip(*task):
            try:
                place[:] = read_pixels(file, size)
            except Unreadable as error:
                failures.append((file, str(error)))
        return failures

    with decompression_bombs_refused(), ThreadPoolExecutor(num_workers()) as pool:
        unreadable = sorted(failure for failures in pool.map(run, tasks) for failure in failures)
    if unreadable:
        named = "; ".join(f"{file} ({reason})" for file, reason in unreadable[:3])
        more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
        raise UserError(
            f"{len(unreadable)} unreadable image files: {named}{more}; remove or replace them"
        )
    return decoded


def num_workers() -> int:
    """`RNP_WORKERS`, else the cores that this process may use.

    Raises: UserError when `RNP_WORKERS` is no number above 0.
    """
    value = os.environ.get("RNP_WORKERS")
    if not value:
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"RNP_WORKERS={value!r} is no number of workers; try 1")
    return int(value)


class Unreadable(Exception):
    """Why a file gives no image."""


def read_image(file: Path, size: int) -> UInt8[Tensor, "3 h w"]:
    """The first image of the file as [3, size, size]: upright, resized, its middle cut out.

    Raises: Unreadable, also for more than `MAX_PIXELS`, which a small file may hold, and for
    formats that are no photograph's.
    """
    with decompression_bombs_refused():
        return torch.from_numpy(read_pixels(file, size))


@contextlib.contextmanager
def decompression_bombs_refused() -> Iterator[None]:
    """Turn Pillow's warning of far too many pixels into an error.

    Threads share warning filters: enter this in the thread that starts the others.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def read_pixels(file: Path, size: int) -> UInt8[np.ndarray, "3 h w"]:
    """The array of `read_image`; decompression bombs are the caller's to refuse.

    JPEGs are decoded at their full size: Pillow's `draft`, which decodes at a half or less, moved
    single pixels by 1 to 4 of 255 and gains nothing for photographs of less than twice `size`.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Unreadable(
                    f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}"
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
    fitted = ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)
    return np.array(fitted).transpose(2, 0, 1)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, from any mode; an alpha channel is dropped."""
    if image.mode.startswith("I;16"):  # Pillow would clip, which turns 16-bit images white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P":  # converted to RGB at once, transparent palettes raise a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def flatten_classes(files: ClassFiles) -> tuple[list[Path], Labels]:
    """All files, class by class, and their labels."""
    labels = [label for label, members in enumerate(files.values()) for _ in members]
    return [file for members in files.values() for file in members], torch.tensor(labels)


def scan(folder: Path) -> ClassFiles:
    """Image files by class, both in alphabetical order, without hidden files and other endings.

    Raises: UserError when there are fewer than two classes, or a class without images.
    """
    classes = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry)
    )
    if len(classes) < 2:
        raise UserError(f"{folder} holds {len(classes)} class folders, at least 2 are needed")
    files = {name: list_images(folder / name) for name in classes}
    empty = [name for name, members in files.items() if not members]
    if empty:
        raise UserError(f"{folder}: no images in class folder {empty[0]!r}")
    return files


def list_images(folder: Path) -> list[Path]:
    """The image files of a class, in alphabetical order."""
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in ENDINGS and not is_hidden(file)
    )


def is_hidden(path: Path) -> bool:
    return path.name.startswith(".")
