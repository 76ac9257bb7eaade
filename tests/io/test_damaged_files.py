"""Damaged, foreign and hostile files end in one line; a full disk leaves no file; no pickles."""

import errno
import json
import os
import pickletools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from stored import files_in, refusal

import rnp
from rnp.attacks.badnets import BadNets
from rnp.io.datasets import save_defense_set, save_images, save_poisoned
from rnp.io.files import write_json
from rnp.io.tensors import META, load_tensors, save_mask
from rnp.types import DefenseSet

FILES = [
    "model",
    "mask",
    "trigger",
    "images/images.npy",
    "images/labels.npy",
    "images/meta.json",
    "poisoned/covers.npy",
    "poisoned/trigger.safetensors",
    "poisoned/attack.json",
]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "short", "garbage", "zip"])
def test_damage_is_named(file, damage, folder):
    victim = folder / file
    content = victim.read_bytes()
    victim.unlink()
    damaged = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "short": content[:-2],
        "garbage": b"\x80\x04garbage",
        "zip": b"PK\x03\x04" + bytes(60),
    }
    if damage != "missing":
        victim.write_bytes(damaged[damage])
    line = refusal(folder, file)
    assert ("does not exist; run the stage" in line) == (damage == "missing")


@pytest.mark.parametrize("file", ["model", "mask", "trigger"])
def test_safetensors_of_others_are_refused(file, folder):
    save_file({"weight": torch.ones(2)}, folder / file, metadata={"format": "pt"})
    assert "was not written by rnp" in refusal(folder, file)


@pytest.mark.parametrize(
    "file, other", [("model", "mask"), ("model", "trigger"), ("mask", "model"), ("trigger", "mask")]
)
def test_files_of_another_kind_are_refused(file, other, folder):
    (folder / file).write_bytes((folder / other).read_bytes())
    assert f"holds '{other}', not a" in refusal(folder, file)


@pytest.mark.parametrize("meta", ["{", "[]", "null", '"text"'])
@pytest.mark.parametrize("file", ["model", "mask", "trigger"])
def test_metadata_that_is_no_object_is_refused(file, meta, folder):
    save_file({"weight": torch.ones(2)}, folder / file, metadata={META: meta})
    refusal(folder, file)


@pytest.fixture
def full_disk(monkeypatch):
    """Every write fails after a few bytes."""

    def write(path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rnp.io.tensors.save_file", lambda tensors, path, **_: write(path))
    monkeypatch.setattr(np, "save", lambda path, *_, **__: write(path))
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: write(path))


def save_poisoned_images(path, toy_set):
    poisoned = BadNets(poison_rate=0.5).poison(toy_set(4), rng=torch.Generator())
    save_poisoned(path, poisoned, {})


@pytest.mark.parametrize(
    "save",
    [
        lambda path, toy_set: save_images(path, toy_set(4)),
        lambda path, toy_set: save_defense_set(path, DefenseSet(toy_set(4), toy_set(4))),
        lambda path, toy_set: save_mask(path, {"bn": torch.ones(2)}),
        save_poisoned_images,
        lambda path, toy_set: write_json(path, {}),
    ],
)
def test_a_full_disk_leaves_no_incomplete_file(save, toy_set, tmp_path, full_disk):
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "result", toy_set)
    assert files_in(tmp_path) == []


def test_no_file_holds_a_pickle(folder):
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert len(files) == 12
    for file in files:
        with pytest.raises((ValueError, UnicodeDecodeError)), file.open("rb") as content:
            list(pickletools.genops(content))
        if file.suffix == ".npy":
            np.load(file, allow_pickle=False)
        elif file.suffix == ".json":
            json.loads(file.read_text())
        else:
            load_tensors(file)


@pytest.mark.parametrize("file", ["images/images.npy", "poisoned/covers.npy"])
def test_an_array_of_objects_is_never_unpickled(file, folder):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(folder / "unpickled"),)

    np.save(folder / file, np.array([Hostile()], dtype=object), allow_pickle=True)
    refusal(folder, file)
    assert not (folder / "unpickled").exists()


UNPICKLING = re.compile(
    r"\btorch\.(?:load|save)\([^\n]*|\b(?:import|from) (?:pickle|joblib|dill)\b|allow_pickle=True"
)


def test_only_the_sandbox_unpickles():
    """And there only weights."""
    root = Path(rnp.__file__).parent
    matches = {
        file.relative_to(root).as_posix(): UNPICKLING.findall(file.read_text())
        for file in root.rglob("*.py")
    }
    (call,) = matches.pop("untrusted/sandbox.py")
    assert "weights_only=True" in call
    assert len(matches) > 100
    assert not any(matches.values())
