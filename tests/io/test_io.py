"""Files: what is written is read back the same, appears whole or not at all, and is never a
program.
"""

import dataclasses
import errno
import json
import os
import pickletools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import rnp
from rnp.attacks.badnets import BadNets
from rnp.attacks.base import BlendTrigger
from rnp.errors import UserError
from rnp.io.datasets import (
    load_defense_set,
    load_images,
    load_poisoned,
    load_trigger,
    save_defense_set,
    save_images,
    save_poisoned,
    save_trigger,
)
from rnp.io.files import (
    atomic_write,
    read_json,
    read_rows,
    sha256,
    write_json,
    write_rows,
    write_text,
)
from rnp.io.history import History, read_trajectory
from rnp.io.models import load_model, save_model
from rnp.io.tensors import META, load_mask, load_tensors, mask_rows, save_mask, save_tensors
from rnp.models.build import Architecture
from rnp.training.predict import predict
from rnp.types import DefenseSet, Epoch, ImageSet

ARCHITECTURE = Architecture(arch="resnet10", width=2)
CLASSES = ("a", "b", "c", "d")


@pytest.fixture
def model(rng):
    return ARCHITECTURE.build(4, 3, torch.full((3,), 0.4), torch.full((3,), 0.2), rng=rng()).eval()


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new folder" / "file.safetensors"


def same(one: ImageSet, other: ImageSet) -> bool:
    return (
        torch.equal(one.images, other.images)
        and torch.equal(one.labels, other.labels)
        and one.classes == other.classes
    )


# What is written is read back


def test_image_sets_come_back_behind_a_memory_map(toy_set, path, is_mapped):
    data = toy_set(6)
    save_images(path, data)
    loaded = load_images(path)
    assert same(loaded, data) and is_mapped(loaded.images)
    loaded.images[0] = 0  # changes stay in memory
    assert same(load_images(path), data)


def test_a_model_keeps_its_memory_layout(model, path):
    save_model(path, model, ARCHITECTURE, CLASSES)
    assert load_model(path)[0].layout is torch.channels_last
    save_model(path, model.lay_out("of a reason"), ARCHITECTURE, CLASSES)
    loaded = load_model(path)[0]
    assert loaded.plain_because == "of a reason" and all(
        p.is_contiguous() for p in loaded.parameters()
    )
    save_tensors(path, model.state_dict(), load_tensors(path)[1] | {"plain_because": None})
    assert load_model(path)[0].layout is torch.channels_last


def test_an_empty_image_set(toy_set, path):
    empty = toy_set(4).subset(torch.tensor([], dtype=torch.int64))
    save_images(path, empty)
    assert same(load_images(path), empty)


def test_defense_sets(toy_set, path):
    save_defense_set(path, DefenseSet(toy_set(6), toy_set(4, seed=1)))
    loaded = load_defense_set(path)
    assert same(loaded.train, toy_set(6)) and same(loaded.val, toy_set(4, seed=1))


def test_models(model, path, toy_set, monkeypatch):
    monkeypatch.setenv("RNP_DEVICE", "cpu")
    save_model(path, model.train(), ARCHITECTURE, CLASSES)
    loaded, architecture, classes = load_model(path)
    assert (architecture, classes, loaded.training) == (ARCHITECTURE, CLASSES, False)
    assert torch.equal(predict(loaded, toy_set(8).images), predict(model, toy_set(8).images))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_masks_keep_order_and_precision(path):
    mask = {"z.bn": torch.tensor([1 - 2**-24, 1e-30]), "a.bn": torch.tensor([1 / 3])}
    save_mask(path, mask)
    loaded = load_mask(path)
    assert list(loaded) == ["z.bn", "a.bn"] and all(
        torch.equal(loaded[layer], mask[layer]) for layer in mask
    )


def test_poisoned_sets(toy_set, rng, path):
    clean, attack = toy_set(40), BadNets(poison_rate=0.2, cover_rate=0.1)
    poisoned = attack.poison(clean, rng=rng())
    save_poisoned(path, poisoned, {"attack": "badnets"} | dataclasses.asdict(attack))
    loaded, options = load_poisoned(path)
    assert same(loaded.apply(clean), poisoned.apply(clean)) and torch.equal(
        loaded.covers, poisoned.covers
    )
    assert (
        torch.equal(loaded.trigger(clean.as_floats()), poisoned.trigger(clean.as_floats()))
        and options["poison_rate"] == 0.2
    )


def test_histories(path):
    rows = [
        Epoch(
            epoch=i // 2,
            step=i,
            loss=-0.5 * i,
            accuracy=0.25,
            learning_rate=1e-3,
            gradient_norm=0.0,
            extra={"share/0": 0.5, "share/1": 0.25 * i},
        )
        for i in range(3)
    ]
    with History(path) as history:
        for i, row in enumerate(rows):
            history(row)
            assert len(path.read_text().splitlines()) == i + 2, "flushed at once"
    assert read_trajectory(path) == rows


def test_rows_and_text(path):
    write_rows(path, [{"x": 1, "y": "a,b"}, {"x": 2, "y": 'c"'}])
    assert read_rows(path) == [{"x": "1", "y": "a,b"}, {"x": "2", "y": 'c"'}]
    write_json(path, {"é": [1, None]})
    assert read_json(path) == {"é": [1, None]} and sha256(path) == sha256(path)


def test_an_absent_file_has_the_default(path):
    assert read_json(path, default={"a": 1}) == {"a": 1}
    with pytest.raises(UserError, match="does not exist"):
        read_json(path)
    write_text(path, "[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        read_json(path, default={})


def test_mask_rows(model):
    mask = {"net.bn1": torch.tensor([0.25, 1.0])}
    assert mask_rows(mask, model) == [
        {"layer": "net.bn1", "index": 0, "mask": "0.250000", "scale": "1", "bias": "0"},
        {"layer": "net.bn1", "index": 1, "mask": "1.000000", "scale": "1", "bias": "0"},
    ]


# The same content gives the same bytes

PROGRAM = """
import sys, torch
from pathlib import Path

from rnp.models.build import Architecture
arch = Architecture(arch="resnet10", width=2)
mean, std = torch.full((3,), 0.4), torch.full((3,), 0.2)
model = arch.build(4, 3, mean, std, rng=torch.Generator().manual_seed(0))
save_model(Path(sys.argv[1]), model, arch, ("a", "b", "c", "d"))
"""


def test_another_process_writes_the_same_bytes(model, path, tmp_path):
    save_model(path, model, ARCHITECTURE, CLASSES)
    other = tmp_path / "other.safetensors"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, other],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        cwd=Path(__file__).parents[2],
    )
    assert other.read_bytes() == path.read_bytes()


def test_image_sets_repeat_byte_for_byte(toy_set, tmp_path):
    for name in ("one", "two"):
        save_images(tmp_path / name, toy_set(6))
    files = [
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("one", "two")
    ]
    assert files[0] == files[1] and len(files[0]) == 3


# Whole or not at all


def left(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*"))


def test_an_exception_leaves_the_old_file_and_no_draft(tmp_path):
    file = tmp_path / "file"
    write_text(file, "old")
    with pytest.raises(KeyboardInterrupt), atomic_write(file) as draft:
        draft.write_text("half of the n")
        raise KeyboardInterrupt
    assert file.read_text() == "old" and left(tmp_path) == ["file"]


def test_a_folder_takes_the_place_of_the_old_one(toy_set, tmp_path):
    folder = tmp_path / "set"
    save_images(folder, toy_set(4))
    (folder / "stray").write_text("from before")
    save_images(folder, toy_set(6))
    assert len(load_images(folder)) == 6 and left(tmp_path) == [
        "set",
        "set/images.npy",
        "set/labels.npy",
        "set/meta.json",
    ]


def test_an_exception_leaves_the_old_folder(toy_set, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    save_images(folder, toy_set(4))
    monkeypatch.setattr("rnp.io.datasets.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_images(folder, toy_set(6))
    assert len(load_images(folder)) == 4 and left(tmp_path) == [
        "set",
        "set/images.npy",
        "set/labels.npy",
        "set/meta.json",
    ]


@pytest.fixture
def full_disk(monkeypatch):
    """Every writer gets a few bytes out and then no more."""

    def write(path):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rnp.io.tensors.save_file", lambda tensors, path, **_: write(path))
    monkeypatch.setattr(np, "save", lambda path, *_, **__: write(path))
    monkeypatch.setattr(Path, "write_text", lambda path, *_, **__: write(path))


@pytest.mark.parametrize(
    "save",
    [
        lambda p, toys: save_images(p, toys(4)),
        lambda p, toys: save_defense_set(p, DefenseSet(toys(4), toys(4))),
        lambda p, toys: save_mask(p, {"bn": torch.ones(2)}),
        lambda p, toys: save_poisoned(
            p, BadNets(poison_rate=0.5).poison(toys(4), rng=torch.Generator()), {}
        ),
        lambda p, toys: write_json(p, {}),
    ],
)
def test_a_full_disk_leaves_nothing_half_written(save, toy_set, tmp_path, full_disk):
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path / "result", toy_set)
    assert left(tmp_path) == []


# Damaged, foreign and hostile files end in one line


@pytest.fixture
def folder(tmp_path, model, toy_set, rng):
    """One good file of each kind."""
    save_model(tmp_path / "model", model, ARCHITECTURE, CLASSES)
    save_mask(tmp_path / "mask", {"bn": torch.ones(2)})
    save_trigger(tmp_path / "trigger", BlendTrigger(torch.ones(3, 8, 8), torch.ones(1, 8, 8)))
    save_images(tmp_path / "images", toy_set(4))
    save_poisoned(
        tmp_path / "poisoned",
        BadNets(poison_rate=0.5).poison(toy_set(8), rng=rng()),
        {"attack": "badnets"},
    )
    return tmp_path


LOAD = {
    "model": load_model,
    "mask": load_mask,
    "trigger": load_trigger,
    "images": load_images,
    "poisoned": load_poisoned,
}
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


def refuses(folder: Path, file: str) -> str:
    """The one line with which the file is refused; it names the file."""
    kind = file.split("/")[0]
    with pytest.raises(UserError) as caught:
        LOAD[kind](folder / kind)
    line = str(caught.value)
    assert str(folder / kind) in line and "\n" not in line
    return line


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("cut", ["missing", "empty", "half", "one byte short", "garbage", "zip"])
def test_damage_is_named(file, cut, folder):
    victim = folder / file
    content = victim.read_bytes()
    victim.unlink()
    if cut != "missing":
        victim.write_bytes(
            {
                "empty": b"",
                "half": content[: len(content) // 2],
                "one byte short": content[:-2],
                "garbage": b"\x80\x04garbage",
                "zip": b"PK\x03\x04" + bytes(60),
            }[cut]
        )
    line = refuses(folder, file)
    assert ("does not exist; run the stage" in line) == (cut == "missing")


@pytest.mark.parametrize("file", ["model", "mask", "trigger"])
def test_safetensors_of_others_are_refused(file, folder):
    save_file({"weight": torch.ones(2)}, folder / file, metadata={"format": "pt"})
    assert "was not written by rnp" in refuses(folder, file)


@pytest.mark.parametrize(
    "file, other", [("model", "mask"), ("model", "trigger"), ("mask", "model"), ("trigger", "mask")]
)
def test_files_of_another_kind_are_refused(file, other, folder):
    (folder / file).write_bytes((folder / other).read_bytes())
    assert f"holds '{other}', not a" in refuses(folder, file)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 3}, "tensor 'net.bn1.bias' is [2], the architecture needs [3]"),
        ({"arch": "preactresnet18"}, "of another architecture"),
        ({"arch": "resnet999"}, "unknown architecture 'resnet999'"),
        ({"classes": ["a"]}, "tensor 'net.fc.bias' is [4], the architecture needs [1]"),
        ({"classes": None}, "does not say"),
        ({"arch": None}, "does not say"),
        ({"width": "wide"}, "does not say"),
    ],
)
def test_a_model_must_fit_the_architecture_that_it_names(change, message, folder):
    tensors, meta = load_tensors(folder / "model")
    save_tensors(folder / "model", tensors, meta | change)
    assert message in refuses(folder, "model")


def test_a_missing_or_an_extra_tensor_is_named(folder):
    tensors, meta = load_tensors(folder / "model")
    bias = tensors.pop("net.fc.bias")
    save_tensors(folder / "model", tensors, meta)
    assert "lacks tensor 'net.fc.bias'" in refuses(folder, "model")
    save_tensors(folder / "model", tensors | {"net.fc.bias": bias, "extra": bias.clone()}, meta)
    assert "has an unexpected tensor 'extra'" in refuses(folder, "model")


@pytest.mark.parametrize("meta", ["{", "[]", "null", '"text"'])
@pytest.mark.parametrize("file", ["model", "mask", "trigger"])
def test_metadata_that_is_no_object_is_refused(file, meta, folder):
    save_file({"weight": torch.ones(2)}, folder / file, metadata={META: meta})
    refuses(folder, file)


@pytest.mark.parametrize(
    "change",
    [
        {"module": "os", "class": "system"},
        {"module": "rnp.attacks.nowhere"},
        {"class": "Nobody"},
        {"class": "to_bytes"},  # a function of that module
        {"class": "Attack"},  # a class, but no trigger
        {"module": None},
        {"class": "Add"},  # a trigger with other buffers
    ],
)
def test_a_trigger_file_names_a_trigger_and_nothing_else(change, folder):
    tensors, meta = load_tensors(folder / "trigger")
    save_tensors(folder / "trigger", tensors, meta | change)
    refuses(folder, "trigger")


def test_a_mask_must_hold_the_layers_that_it_names(folder):
    save_tensors(
        folder / "mask", {"bn": torch.ones(2)}, {"kind": "mask", "layers": ["bn", "other"]}
    )
    refuses(folder, "mask")


def test_images_and_labels_must_go_together(folder):
    np.save(folder / "images" / "labels.npy", np.zeros(3, np.int64))
    assert "holds 4 images but 3 labels" in refuses(folder, "images")


@pytest.mark.parametrize(
    "images, labels, classes",
    [
        (np.zeros((4, 3, 8, 8), np.float32), np.zeros(4, np.int64), CLASSES),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(4, np.int64), CLASSES),
        (np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.float32), CLASSES),
        (np.zeros((4, 3, 8, 8), np.uint8), np.full(4, 9), CLASSES),
        (np.zeros((4, 3, 8, 8), np.uint8), np.full(4, -1), CLASSES),
    ],
)
def test_arrays_of_another_kind_are_refused(images, labels, classes, folder):
    np.save(folder / "images" / "images.npy", images)
    np.save(folder / "images" / "labels.npy", labels)
    refuses(folder, "images")


# Nothing is a program


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
            return os.mkdir, (str(folder / "pwned"),)

    np.save(folder / file, np.array([Hostile()], dtype=object), allow_pickle=True)
    refuses(folder, file)
    assert not (folder / "pwned").exists()


def test_the_source_knows_no_unpickling():
    word = re.compile(
        r"\btorch\.(?:load|save)\([^\n]*|\b(?:import|from)"
        r" (?:pickle|joblib|dill)\b|allow_pickle=True"
    )
    files = list((Path(rnp.__file__).parent).rglob("*.py"))
    found = {file.name: word.findall(file.read_text()) for file in files}
    (opened,) = found.pop("sandbox.py")  # the one place for untrusted files
    assert "weights_only=True" in opened and len(found) > 30 and not any(found.values())
