"""The reader of CIFAR-10 on a folder of ten images, because the real files are too large."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from rnp.data.cifar10 import FOLDER, Cifar10
from rnp.errors import UserError


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Six training and four test images: pixels are channel * 50 + column, labels count from 9."""
    folder = tmp_path / FOLDER
    folder.mkdir()
    pixels = np.arange(3)[:, None, None] * 50 + np.zeros((32, 1), int) + np.arange(32)
    image = pixels.astype(np.uint8).reshape(1, -1)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(n):
        return {"data": image.repeat(n, 0), "labels": list(range(9, 9 - n, -1))}

    monkeypatch.setattr(CIFAR10, "train_list", [write("a", batch(4)), write("b", batch(2))])
    monkeypatch.setattr(CIFAR10, "test_list", [write("c", batch(4))])
    name, checksum = write("meta", {"names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "names", "md5": checksum})
    return tmp_path


def test_channels_first_and_in_order(root, rng):
    train, test = Cifar10().load(root, rng=rng())
    assert train.labels.tolist() == [9, 8, 7, 6, 9, 8]
    assert train.classes[3] == "class3"
    assert len(test) == 4
    assert train.shape == (3, 32, 32)
    assert train.images.dtype == torch.uint8
    assert train.images.is_contiguous()
    assert train.images[0, 2, 5].tolist() == list(range(100, 132))


@pytest.mark.parametrize("name", ["b", "c", "meta"])
@pytest.mark.parametrize("missing", [True, False])
def test_missing_or_corrupt_files_are_one_line(missing, name, root, rng):
    victim = root / FOLDER / name
    content = victim.read_bytes()
    victim.unlink()
    if not missing:
        victim.write_bytes(content[:-1])
    message = r"missing or corrupt under .*cifar-10-batches-py.*RNP_DATA"
    with pytest.raises(UserError, match=message) as caught:
        Cifar10().load(root, rng=rng())
    assert str(root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_folder_is_the_one_of_torchvision():
    assert FOLDER == CIFAR10.base_folder


def test_a_download_without_network_is_one_line(tmp_path, rng, monkeypatch):
    def offline(self):
        raise OSError("Name or service not known")  # urllib's URLError is one

    monkeypatch.setattr(CIFAR10, "download", offline)
    with pytest.raises(UserError, match="CIFAR-10"):
        Cifar10(download=True).load(tmp_path, rng=rng())
