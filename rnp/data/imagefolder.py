"""A folder of images: train/CLASS/*.png and test/CLASS/*.png, or CLASS/*.png split by the seed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from rnp.data.base import Dataset, interleave
from rnp.errors import UserError
from rnp.types import ImageSet, room

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM", "TIFF")  # others, such as EPS, start programs
MOST_PIXELS = 50_000_000


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Dataset):
    """Any images, one folder per class; decoded one by one into a memory map, so that memory stays small.

    Each is turned upright, converted to RGB, its shorter side resized to `size`, and its middle cut out.
    """

    path: Annotated[str, "the folder, relative to where data sets lie, or absolute"] = "images"
    size: Annotated[int, "side of the square images that are made, in pixels"] = 64
    test_share: Annotated[float, "share of the images that form the test set, where there are no train and test folders"] = 0.2

    def __post_init__(self) -> None:
        if self.size < 8:
            raise UserError(f"imagefolder.size must be at least 8 pixels, got {self.size}")
        if not 0 < self.test_share < 1:
            raise UserError(f"imagefolder.test_share must be in (0, 1), got {self.test_share:g}")

    def load(self, root: Path, *, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        folder = root / self.path
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder; set datasets.imagefolder.path")
        if (folder / "train").is_dir() and (folder / "test").is_dir():
            train, test = scan(folder / "train"), scan(folder / "test")
            if train.keys() != test.keys():
                odd = sorted(train.keys() ^ test.keys())
                raise UserError(f"{folder}: class folders {', '.join(odd)} are in train or in test only")
            return self._decode(train), self._decode(test)
        everything = self._decode(scan(folder))
        order = interleave(everything.labels, len(everything.classes), rng)
        cut = round(len(order) * self.test_share)
        if cut == 0:
            raise UserError(f"{folder} holds {len(order)} images, too few to set {self.test_share:g} of them aside for the test")
        return everything.subset(order[cut:].sort().values), everything.subset(order[:cut].sort().values)

    def _decode(self, files: dict[str, list[Path]]) -> ImageSet:
        """Raises: UserError naming every file that cannot be read."""
        labels = [label for label, members in enumerate(files.values()) for _ in members]
        images = room(len(labels), 3, self.size, self.size)
        unreadable = []
        for i, file in enumerate(path for members in files.values() for path in members):
            try:
                images[i] = read_image(file, self.size)
            except Unreadable as error:
                unreadable.append(f"{file} ({error})")
        if unreadable:
            more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
            raise UserError(f"{len(unreadable)} unreadable image files: {'; '.join(unreadable[:3])}{more}; remove or replace them")
        return ImageSet(images, torch.tensor(labels), tuple(files))


class Unreadable(Exception):
    """Why a file gives no image."""


def read_image(file: Path, size: int) -> UInt8[Tensor, "3 h w"]:
    """The file as [3, size, size]: upright, its shorter side resized, its middle cut out; the first frame of several.

    Raises: Unreadable, also for more than `MOST_PIXELS`, which a small file may hold, and for formats that are no photograph's.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise Unreadable(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
                upright = to_rgb(ImageOps.exif_transpose(image))
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning, SyntaxError,
            ValueError, EOFError) as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error
    return torch.from_numpy(np.array(ImageOps.fit(upright, (size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; an alpha channel is dropped."""
    if image.mode.startswith("I;16"):  # Pillow would clip, which turns 16-bit images white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P":  # straight to RGB, a palette with transparency draws a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def scan(folder: Path) -> dict[str, list[Path]]:
    """Image files by class, both in alphabetical order; hidden files and other endings are passed over.

    Raises: UserError when there are fewer than two classes, or a class without images.
    """
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{folder} holds {len(classes)} class folders, at least 2 are needed")
    files = {name: sorted(f for f in (folder / name).iterdir() if f.suffix.lower() in ENDINGS and not f.name.startswith("."))
             for name in classes}
    empty = [name for name, members in files.items() if not members]
    if empty:
        raise UserError(f"{folder}: no images in class folder {empty[0]!r}")
    return files
