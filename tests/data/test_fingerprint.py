"""The fingerprint of a data set changes with its files, and with nothing else."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from rnp.data.base import digest_files
from rnp.data.cifar10 import FOLDER, Cifar10
from rnp.data.digits import Digits
from rnp.data.imagefolder import ImageFolder
from rnp.data.shapes import Shapes
from rnp.errors import UserError


@pytest.fixture
def root(tmp_path):
    """Two classes of three images in `images`, three files of CIFAR-10."""
    for folder in ("images/cats", "images/dogs"):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (50 * i, 0, 0)).save(tmp_path / folder / f"{i}.png")
    (tmp_path / FOLDER).mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (tmp_path / FOLDER / name).write_bytes(b"content")
    return tmp_path


def change(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"more")


def touch(file: Path) -> None:
    """Write other content of the same size, later."""
    modified = file.stat().st_mtime_ns
    file.write_bytes(bytes(file.stat().st_size))
    os.utime(file, ns=(modified, modified + 1))


def add(file: Path) -> None:
    shutil.copy2(file, file.with_name("new.png"))


def rename(file: Path) -> None:
    file.rename(file.with_name("new.png"))


CASES = [(ImageFolder(size=8), "images/cats/1.png"), (Cifar10(), f"{FOLDER}/test_batch")]
both = pytest.mark.parametrize("dataset, file", CASES, ids=("imagefolder", "cifar10"))


@both
@pytest.mark.parametrize("edit", [change, touch, add, Path.unlink, rename])
def test_every_edit_of_a_file_changes_it(edit, dataset, file, root):
    before = dataset.fingerprint(root)
    edit(root / file)
    assert dataset.fingerprint(root) != before


def test_a_file_in_another_class_changes_it(root):
    dataset = ImageFolder()
    before = dataset.fingerprint(root)
    (root / "images/cats/1.png").rename(root / "images/dogs/9.png")
    assert dataset.fingerprint(root) != before
    (root / "images/dogs/9.png").rename(root / "images/cats/1.png")
    assert dataset.fingerprint(root) == before, "as it was again"


def test_reading_does_not_change_it(root):
    dataset = ImageFolder(size=8)
    before = dataset.fingerprint(root)
    dataset.load(root, rng=torch.Generator())
    assert dataset.fingerprint(root) == before
    assert len(before) == 16


def test_a_copy_elsewhere_has_the_same(root, tmp_path_factory):
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(root, copy)  # which keeps modification times
    for dataset, _ in CASES:
        assert dataset.fingerprint(copy) == dataset.fingerprint(root)


def test_the_order_of_the_file_system_does_not_matter(root):
    files = list((root / "images").rglob("*.png"))
    assert digest_files(root, files) == digest_files(root, files[::-1])


def test_train_and_test_folders_both_count(root):
    for part in ("train", "test"):
        shutil.copytree(root / "images", root / "parts" / part)
    dataset = ImageFolder(path="parts")
    before = dataset.fingerprint(root)
    change(root / "parts/train/cats/0.png")
    after_train = dataset.fingerprint(root)
    change(root / "parts/test/cats/0.png")
    assert len({before, after_train, dataset.fingerprint(root)}) == 3


@pytest.mark.parametrize("name", ["notes.txt", ".DS_Store", "._0.png"])
def test_files_that_are_no_images_do_not_change_it(name, root):
    dataset = ImageFolder()
    before = dataset.fingerprint(root)
    (root / "images/cats" / name).write_text("no image")
    assert dataset.fingerprint(root) == before


def test_no_image_is_decoded(root):
    (root / "images/cats/0.png").write_bytes(b"not an image")
    assert ImageFolder().fingerprint(root)


def test_generated_images_have_none(tmp_path):
    assert Shapes().fingerprint(tmp_path) == Digits().fingerprint(tmp_path) == ""


def test_cifar10_has_none_before_it_is_downloaded(tmp_path):
    assert Cifar10(download=True).fingerprint(tmp_path) == ""
    (tmp_path / FOLDER).mkdir()
    assert Cifar10(download=True).fingerprint(tmp_path) == ""


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"images is no folder; set datasets.imagefolder.path"):
        ImageFolder().fingerprint(tmp_path)
