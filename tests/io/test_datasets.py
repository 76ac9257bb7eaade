"""Image sets, defense sets, triggers and poisoned sets are read back the same."""

import dataclasses

import numpy as np
import pytest
import torch
from stored import CLASSES, equal, files_in, refusal

from rnp.attacks.badnets import BadNets
from rnp.attacks.base import AdditiveTrigger, BlendTrigger
from rnp.attacks.bpp import Quantize
from rnp.attacks.input_aware import InputAwareTrigger
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
from rnp.io.tensors import load_tensors, save_tensors
from rnp.models.unet import draw_unet
from rnp.types import DefenseSet

FILES = ["set", "set/images.npy", "set/labels.npy", "set/meta.json"]


def test_image_sets_are_loaded_behind_a_memory_map(toy_set, path, is_mapped):
    data = toy_set(6)
    save_images(path, data)
    loaded = load_images(path)
    assert equal(loaded, data)
    assert is_mapped(loaded.images)
    loaded.images[0] = 0  # changes stay in memory
    assert equal(load_images(path), data)


def test_an_empty_image_set(toy_set, path):
    empty = toy_set(4).subset(torch.tensor([], dtype=torch.int64))
    save_images(path, empty)
    assert equal(load_images(path), empty)


def test_image_sets_repeat_byte_for_byte(toy_set, tmp_path):
    for name in ("a", "b"):
        save_images(tmp_path / name, toy_set(6))
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert files[0] == files[1]
    assert len(files[0]) == 3


def test_a_folder_replaces_the_old_one(toy_set, tmp_path):
    folder = tmp_path / "set"
    save_images(folder, toy_set(4))
    (folder / "extra").write_text("from before")
    save_images(folder, toy_set(6))
    assert len(load_images(folder)) == 6
    assert files_in(tmp_path) == FILES


def test_an_exception_leaves_the_old_folder(toy_set, tmp_path, monkeypatch):
    folder = tmp_path / "set"
    save_images(folder, toy_set(4))

    def fail(path, value):
        raise ZeroDivisionError

    monkeypatch.setattr("rnp.io.datasets.write_json", fail)
    with pytest.raises(ZeroDivisionError):
        save_images(folder, toy_set(6))
    assert len(load_images(folder)) == 4
    assert files_in(tmp_path) == FILES


def test_defense_sets(toy_set, path):
    save_defense_set(path, DefenseSet(toy_set(6), toy_set(4, seed=1)))
    loaded = load_defense_set(path)
    assert equal(loaded.train, toy_set(6))
    assert equal(loaded.val, toy_set(4, seed=1))


def test_poisoned_sets(toy_set, rng, path):
    clean = toy_set(40)
    attack = BadNets(poison_rate=0.2, cover_rate=0.1)
    poisoned = attack.poison(clean, rng=rng())
    save_poisoned(path, poisoned, {"attack": "badnets"} | dataclasses.asdict(attack))
    loaded, options = load_poisoned(path)
    images = clean.as_floats()
    assert equal(loaded.apply(clean), poisoned.apply(clean))
    assert torch.equal(loaded.covers, poisoned.covers)
    assert torch.equal(loaded.trigger(images), poisoned.trigger(images))
    assert options.pop("attack") == "badnets"
    assert BadNets(**options) == attack


def old_triggers(rng):
    """Triggers, and module and class that older versions wrote for them."""
    weights = draw_unet(3, 1, 4, rng=rng, device=torch.device("cpu"), prefix="mask_")
    weights |= draw_unet(3, 3, 4, rng=rng, device=torch.device("cpu"), prefix="pattern_")
    weights = {name: value.detach() for name, value in weights.items()}
    pattern = torch.rand(3, 8, 8, generator=rng)
    weight = torch.rand(1, 8, 8, generator=rng)
    return {
        ("rnp.attacks.base", "Mix"): BlendTrigger(pattern, weight),
        ("rnp.attacks.base", "Add"): AdditiveTrigger(pattern),
        ("rnp.attacks.bpp", "Quantise"): Quantize(torch.tensor(8.0)),
        ("rnp.attacks.dynamic", "InputAware"): InputAwareTrigger(**weights),
    }


@pytest.mark.parametrize("name", old_triggers(torch.Generator()), ids=".".join)
def test_trigger_files_of_older_versions(name, toy_set, rng, path):
    trigger = old_triggers(rng())[name]
    module, cls = name
    meta = {"kind": "trigger", "module": module, "class": cls}
    save_tensors(path, dict(trigger.named_buffers()), meta)
    loaded = load_trigger(path)
    images = toy_set(4).as_floats()
    assert type(loaded) is type(trigger)
    assert torch.equal(loaded(images), trigger(images))
    save_trigger(path, loaded)
    assert load_tensors(path)[1]["class"] == type(trigger).__name__, "saved under its name of today"


@pytest.mark.parametrize(
    "change",
    [
        {"module": "os", "class": "system"},
        {"module": "rnp.attacks.nowhere"},
        {"class": "Nobody"},
        {"class": "to_bytes"},  # a function of that module
        {"class": "Attack"},  # a class, but no trigger
        {"module": None},
        {"class": "AdditiveTrigger"},  # a trigger with other buffers
        {"class": "Add"},
        {"module": "rnp.attacks.dynamic", "class": "InputAwareTrigger"},  # no such file any more
    ],
)
def test_a_trigger_file_names_a_trigger_and_nothing_else(change, folder):
    tensors, meta = load_tensors(folder / "trigger")
    save_tensors(folder / "trigger", tensors, meta | change)
    refusal(folder, "trigger")


def test_images_and_labels_must_have_the_same_number(folder):
    np.save(folder / "images" / "labels.npy", np.zeros(3, np.int64))
    assert "holds 4 images but 3 labels" in refusal(folder, "images")


@pytest.mark.parametrize(
    "images, labels",
    [
        (np.zeros((4, 3, 8, 8), np.float32), np.zeros(4, np.int64)),
        (np.zeros((4, 8, 8), np.uint8), np.zeros(4, np.int64)),
        (np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.float32)),
        (np.zeros((4, 3, 8, 8), np.uint8), np.full(4, len(CLASSES))),
        (np.zeros((4, 3, 8, 8), np.uint8), np.full(4, -1)),
    ],
)
def test_arrays_of_another_kind_are_refused(images, labels, folder):
    np.save(folder / "images" / "images.npy", images)
    np.save(folder / "images" / "labels.npy", labels)
    assert "make it anew" in refusal(folder, "images")
