"""One architecture and its classes, for tests of files, and how a bad file is refused."""

from pathlib import Path

import pytest
import torch

from rnp.errors import UserError
from rnp.io.datasets import load_images, load_poisoned, load_trigger
from rnp.io.models import load_model
from rnp.io.tensors import load_mask
from rnp.models.build import Architecture
from rnp.types import ImageSet

ARCHITECTURE = Architecture(arch="resnet10", width=2)
CLASSES = ("a", "b", "c", "d")
LOAD = {
    "model": load_model,
    "mask": load_mask,
    "trigger": load_trigger,
    "images": load_images,
    "poisoned": load_poisoned,
}


def refusal(folder: Path, file: str) -> str:
    """The one line with which loading `file` (or the folder it is in) fails; it names the path."""
    kind = file.split("/")[0]
    with pytest.raises(UserError) as caught:
        LOAD[kind](folder / kind)
    line = str(caught.value)
    assert str(folder / kind) in line
    assert "\n" not in line
    return line


def equal(a: ImageSet, b: ImageSet) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and a.classes == b.classes
    )


def files_in(folder: Path) -> list[str]:
    """All files and folders, by their path from `folder`."""
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))
