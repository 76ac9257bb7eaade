"""CIFAR-10, read through torchvision, which checks it against the published checksums."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from rnp.data.base import Dataset, digest_files
from rnp.errors import UserError
from rnp.types import ImageSet

FOLDER = "cifar-10-batches-py"


@dataclass(frozen=True, kw_only=True)
class Cifar10(Dataset):
    """Ten classes of photographs: 50,000 images to train on, 10,000 to test, 32 by 32 pixels.

    Source: Krizhevsky, 2009, Learning multiple layers of features from tiny images.
    """

    download: Annotated[bool, "fetch the files when they are missing"] = False

    def load(self, root: Path, *, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        try:
            return self._read(root, train=True), self._read(root, train=False)
        except (RuntimeError, OSError) as error:  # OSError: no network
            raise UserError(
                f"CIFAR-10 is missing or corrupt under {root}: put {FOLDER} there,"
                " point RNP_DATA at its folder, or set datasets.cifar10.download to true"
            ) from error

    def _read(self, root: Path, train: bool) -> ImageSet:
        from torchvision.datasets import CIFAR10  # two seconds to import

        part = CIFAR10(root, train=train, download=self.download)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return ImageSet(images, torch.tensor(part.targets), tuple(part.classes))

    def fingerprint(self, root: Path) -> str:
        """A digest of the files of CIFAR-10; empty when they are not there (yet)."""
        folder = root / FOLDER
        files = [file for file in folder.rglob("*") if file.is_file()]
        return digest_files(folder, files) if files else ""
