"""Images of unknown origin are decoded within limits and mapped to the outputs of the model."""

import os

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from rnp.errors import UserError
from rnp.untrusted.images import (
    CleanImages,
    load_clean_images,
    map_labels_to_outputs,
    pseudo_labels,
)


def paint(path, color=(200, 10, 10), size=(20, 16), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    for name, color in (("cat", (255, 0, 0)), ("dog", (0, 0, 255))):
        for i in range(4):
            paint(tmp_path / "images" / name / f"{i}.png", color)
    return tmp_path / "images"


def read(source, rng, **options):
    return load_clean_images(str(source), **{"size": 8, "limit": 100, "rng": rng(), **options})


def test_folders_are_classes(folder, rng):
    found = read(folder, rng)
    assert (
        found.images.shape == (8, 3, 8, 8)
        and sorted(found.labels) == ["cat"] * 4 + ["dog"] * 4
        and found.skipped == []
    )
    for image, label in zip(found.images, found.labels):
        assert image[:, 4, 4].tolist() == [255 * (label == "cat"), 0, 255 * (label == "dog")]


def test_a_limit_takes_all_classes_alike(folder, rng):
    assert sorted(read(folder, rng, limit=4).labels) == ["cat", "cat", "dog", "dog"]


def test_a_folder_without_folders_has_no_labels(folder, rng):
    assert read(folder / "cat", rng).labels is None


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("labels", [["cat", "dog"], [1, 0], None])
def test_tables(folder, rng, ending, labels):
    rows = pandas.DataFrame(
        {"path": ["cat/0.png", str(folder / "dog" / "1.png")]}
        | ({"label": labels} if labels else {})
    )
    table = folder / f"table.{ending}"
    rows.to_csv(table, index=False) if ending == "csv" else rows.to_parquet(table)
    found = read(table, rng)
    reds = [image[0, 4, 4].item() == 255 for image in found.images]
    assert sorted(reds) == [False, True]
    assert found.labels == (
        None if labels is None else [labels[0] if red else labels[1] for red in reds]
    )


def test_unreadable_files_are_skipped_and_named(folder, rng):
    (folder / "cat" / "9.png").write_bytes(b"\x89PNG no image")
    whole = (folder / "dog" / "0.png").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(
        folder / "dog" / "8.png"
    )
    (folder / "dog" / "8.png").write_bytes((folder / "dog" / "8.png").read_bytes()[:2000])
    os.symlink("/etc/hostname", folder / "dog" / "7.png")
    paint(folder / "cat" / "large.png", size=(8000, 7000))
    (folder / "cat" / "script.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    )
    found = read(folder, rng)
    assert len(found.images) == 8 and len(found.skipped) == 5 and whole
    for name, why in (
        ("9.png", "cannot identify"),
        ("8.png", "truncated"),
        ("7.png", "leads out of the folder"),
        ("large.png", "8000 x 7000 pixels"),
        ("script.png", "cannot identify"),
    ):
        (line,) = [line for line in found.skipped if name in line]
        assert why in line, line


def test_uncommon_images_are_decoded(tmp_path, rng):
    """Gray, alpha, palette, CMYK, animated: each is one RGB image; an EXIF turn is carried out."""
    for name, mode in (
        ("l.png", "L"),
        ("la.png", "LA"),
        ("p.gif", "P"),
        ("cmyk.jpg", "CMYK"),
        ("rgba.png", "RGBA"),
    ):
        paint(tmp_path / name, (90, 90, 90), mode=mode)
    frames = [Image.new("RGB", (16, 16), (90, 90, 90)), Image.new("RGB", (16, 16), (0, 0, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((16, 16), 90 * 257, np.uint16)).save(tmp_path / "deep.png")
    found = read(tmp_path, rng)
    assert found.skipped == [] and len(found.images) == 7
    assert (found.images.int() - 90).abs().max() <= 8  # the palette and JPEG round
    turned = Image.new("RGB", (16, 16), (0, 0, 0))
    turned.paste((255, 255, 255), (0, 0, 16, 8))  # the upper half is white
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "sub.png", exif=exif)
    for other in tmp_path.glob("*.*"):
        if other.name != "sub.png":
            other.unlink()
    (image,) = read(tmp_path, rng).images
    assert image[0, 1, 4] < 50 and image[0, 6, 4] > 200


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "nothing", "is no folder and no .csv"),
        (lambda d: d, "holds no images"),
        (lambda d: write(d / "a.csv", "file\nx.png\n"), "has no column path"),
        (lambda d: write(d / "a.csv", ""), "no readable table"),
        (
            lambda d: write(d / "a.csv", "path,label\nx.png,1\ny.png,\n"),
            "some rows have a label and some have none",
        ),
        (lambda d: write(d / "a.csv", "path\nx.png\n"), "holds no readable image: .*x.png"),
        (lambda d: "torchvision:Nothing", "torchvision has no data set 'Nothing'"),
        (lambda d: "torchvision:CIFAR10", "is not in data"),
    ],
)
def test_sources_that_are_none(tmp_path, rng, make, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        read(make(tmp_path), rng)


def write(path, text):
    path.write_text(text)
    return path


def test_a_data_set_of_torchvision(rng, monkeypatch):
    from torchvision import datasets

    class Pairs(list):
        def __init__(self, root, split="train"):
            super().__init__(
                [(Image.new("L", (20, 30), 7 * i), i % 3) for i in range(9)]
                if split == "test"
                else 1 / 0
            )

    monkeypatch.setattr(datasets, "Pairs", Pairs, raising=False)
    found = read("torchvision:Pairs", rng, limit=6)
    assert found.images.shape == (6, 3, 8, 8)
    assert [
        label == image[0, 0, 0].item() // 7 % 3 for image, label in zip(found.images, found.labels)
    ] == [True] * 6


def gathered(labels):
    return CleanImages(torch.zeros(len(labels or [0]), 3, 4, 4, dtype=torch.uint8), labels, [])


def test_names_become_the_indices_of_the_outputs():
    labels, names = map_labels_to_outputs(gathered(["dog", "cat"]), [], 2)
    assert (labels.tolist(), names) == ([1, 0], ("cat", "dog"))
    labels, names = map_labels_to_outputs(gathered(["dog", "cat"]), ["ox", "dog", "cat"], 3)
    assert (labels.tolist(), names) == ([1, 2], ("ox", "dog", "cat"))
    labels, names = map_labels_to_outputs(gathered([2, 0]), [], 3)
    assert (labels.tolist(), names) == ([2, 0], ("0", "1", "2"))
    assert map_labels_to_outputs(gathered(None), [], 2) == (None, ("0", "1"))


@pytest.mark.parametrize(
    ("labels", "named", "k", "words"),
    [
        (["a", "b"], [], 3, "3 outputs, the images 2 classes"),
        (["a", "b"], ["a", "b"], 3, "3 outputs, but 2 classes are named"),
        (["a", "c"], ["a", "b"], 2, "images of class 'c'"),
        ([0, 3], [], 3, "labels go from 0 to 3"),
        ([-1, 1], [], 2, "from -1"),
    ],
)
def test_names_that_do_not_fit_are_refused(labels, named, k, words):
    with pytest.raises(UserError, match=words):
        map_labels_to_outputs(gathered(labels), named, k)


def test_confident_answers_serve_as_labels(trained, toy_set):
    data = toy_set(40)
    positions, labels = pseudo_labels(trained, data.images, 0.9)
    assert 0 < len(positions) < 40 and len(pseudo_labels(trained, data.images, 0.0)[0]) == 40
    assert (labels == data.labels[positions]).float().mean() > 0.95
