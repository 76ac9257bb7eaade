"""Images of every kind become RGB squares; what cannot be read is named."""

import json
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rnp.data.base import interleave
from rnp.data.imagefolder import FILES_PER_TASK, ImageFolder, read_image
from rnp.errors import UserError

SIZE = 8


def paint(path, color="red", size=(16, 16), mode="RGB", **options):
    """Write an image of one color."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    """Two classes, five images each, all different."""
    for c, name in enumerate(("cats", "dogs")):
        for i in range(5):
            paint(tmp_path / "images" / name / f"{i}.png", (50 * i, 100 * c, 7))
    return tmp_path / "images"


def load(folder, seed=0, **options):
    return ImageFolder(size=SIZE, **options).load(
        folder.parent, rng=torch.Generator().manual_seed(seed)
    )


def colors(data) -> list[tuple[int, ...]]:
    return sorted(tuple(image[:, 0, 0].tolist()) for image in data.images)


def test_split_by_the_seed(folder):
    train, test = load(folder, test_share=0.4)
    again, _ = load(folder, test_share=0.4)
    seed_1, _ = load(folder, 1, test_share=0.4)
    assert train.classes == ("cats", "dogs")
    assert train.labels.bincount().tolist() == [3, 3]
    assert test.labels.bincount().tolist() == [2, 2]
    assert colors(train) == colors(again) != colors(seed_1)
    painted = sorted((50 * i, 100 * c, 7) for i in range(5) for c in range(2))
    assert sorted(colors(train) + colors(test)) == painted
    for part in (train, test):
        assert torch.equal(part.images[:, 1, 0, 0].long(), 100 * part.labels), "green is the class"


def test_own_train_and_test_folders(tmp_path):
    for part, n in (("train", 3), ("test", 2)):
        for name, color in (("b", "blue"), ("a", "red")):
            for i in range(n):
                paint(tmp_path / "images" / part / name / f"{i}.PNG", color, format="PNG")
    train, test = load(tmp_path / "images")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert test.labels.tolist() == [0, 0, 1, 1]
    assert train.classes == ("a", "b")
    assert colors(test) == [(0, 0, 255)] * 2 + [(255, 0, 0)] * 2


def test_a_large_folder_becomes_a_memory_map_that_leaves_no_file(tmp_path, monkeypatch, is_mapped):
    monkeypatch.setattr("rnp.types.LARGE", 0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setenv("TMPDIR", str(scratch))
    for name in "ab":
        paint(tmp_path / "images" / "train" / name / "0.png")
        paint(tmp_path / "images" / "test" / name / "0.png")
    train, _ = load(tmp_path / "images")
    assert is_mapped(train.images)
    assert not is_mapped(train.images.clone())
    assert list(scratch.iterdir()) == []
    assert colors(train) == [(255, 0, 0)] * 2


@pytest.fixture
def photographs(tmp_path):
    """More files than two threads take at once, of all sizes, in the order of the data set."""
    draw = np.random.default_rng(0)
    files = []
    for c, n in (("cats", FILES_PER_TASK + 5), ("dogs", FILES_PER_TASK + 9)):
        (tmp_path / "images" / c).mkdir(parents=True)
        for i in range(n):
            height, width = draw.integers(8, 40, 2)
            files.append(tmp_path / "images" / c / f"{i:03}.{'png' if i % 2 else 'jpg'}")
            Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(files[-1])
    return files


@pytest.mark.parametrize("workers", ["1", "2", "5", None])
def test_any_number_of_workers_gives_the_same_bytes_and_split(
    workers, photographs, monkeypatch, rng
):
    """The same as when the files are read one by one and split afterwards."""
    if workers:
        monkeypatch.setenv("RNP_WORKERS", workers)
    folder = photographs[0].parents[1]
    everything = torch.stack([read_image(file, SIZE) for file in photographs])
    labels = torch.tensor([file.parent.name == "dogs" for file in photographs]).long()
    order = interleave(labels, 2, rng(3))
    cut = round(0.2 * len(order))
    halves = order[cut:].sort().values, order[:cut].sort().values
    for part, positions in zip(load(folder, 3), halves):
        assert torch.equal(part.images, everything[positions])
        assert torch.equal(part.labels, labels[positions])


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_an_impossible_number_of_workers_is_refused(value, folder, monkeypatch):
    monkeypatch.setenv("RNP_WORKERS", value)
    with pytest.raises(UserError, match=f"RNP_WORKERS='{value}' is no number of workers"):
        load(folder)


MEASURE_MEMORY = """
import json, sys
from benchmarks.images import MemoryWatch
import torch
from rnp import types
from rnp.attacks import base
from rnp.data.base import Split
from rnp.data.imagefolder import ImageFolder
from rnp.io.datasets import load_images, save_defense_set, save_images
from rnp.attacks.badnets import BadNets
from rnp.models.build import statistics
from pathlib import Path

folder, peaks = Path(sys.argv[1]), {}

def work(size):
    rng = torch.Generator().manual_seed(0)
    train, test = ImageFolder(path="images", size=size).load(folder, rng=rng)
    splits = Split(defense_train=10, defense_val=10)(train, test, rng=rng)
    for part in ("pool", "test"):
        save_images(folder / part, getattr(splits, part))
    save_defense_set(folder / "defense", splits.defense)
    pool, test = (load_images(folder / part) for part in ("pool", "test"))
    poisoned = BadNets().poison(pool, rng=rng)
    statistics(poisoned.apply(pool))
    base.backdoored_test_set(poisoned.trigger, test, 0)

base.CHUNK_VALUES //= 8  # floats at the same time, which count too
work(8)  # imports
for name, large in (("mapped", 0), ("in memory", 2**40)):
    types.LARGE = large
    with MemoryWatch() as watch:
        work(256)
    peaks[name] = watch.row(1)["anonymous"]
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_no_whole_copy_is_held_in_memory(tmp_path):
    """Of 118 MB of images, from the files to the triggered test set; 240 MB without maps."""
    paint(tmp_path / "one.png", "red", (256, 256))
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(300):
            os.link(tmp_path / "one.png", tmp_path / "images" / name / f"{i}.png")
    settings = {"TMPDIR": str(tmp_path), "RNP_WORKERS": "2", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | settings,
        cwd=Path(__file__).parents[2],
    )
    peaks = json.loads(process.stdout)
    images = 600 * 3 * 256 * 256
    assert peaks["mapped"] < 0.5 * images < images < peaks["in memory"], peaks


def decoded(path) -> np.ndarray:
    """[h, w, 3] as the data set reads the file."""
    return read_image(path, SIZE).permute(1, 2, 0).numpy()


SIXTEEN_BITS = Image.fromarray(np.full((16, 16), 90 * 256 + 200, np.uint16))
TRANSPARENT = Image.new("P", (16, 16))


@pytest.mark.parametrize(
    "name, make, color",
    [
        ("rgb.png", lambda p: paint(p, (10, 20, 30)), (10, 20, 30)),
        ("gray.png", lambda p: paint(p, 90, mode="L"), (90, 90, 90)),
        ("bits.png", lambda p: paint(p, 1, mode="1"), (255, 255, 255)),
        ("cmyk.tif", lambda p: paint(p, (255, 0, 0, 0), mode="CMYK"), (0, 255, 255)),
        ("alpha.png", lambda p: paint(p, (10, 20, 30, 255), mode="RGBA"), (10, 20, 30)),
        ("gray_alpha.png", lambda p: paint(p, (90, 255), mode="LA"), (90, 90, 90)),
        ("palette.gif", lambda p: paint(p, (10, 20, 30)), (10, 20, 30)),
        ("palette.png", lambda p: TRANSPARENT.save(p, transparency=b"\x80\xff"), (0, 0, 0)),
        ("sixteen.png", lambda p: SIXTEEN_BITS.save(p), (90, 90, 90)),
        ("sixteen.tif", lambda p: SIXTEEN_BITS.save(p), (90, 90, 90)),
    ],
)
def test_any_kind_of_image_becomes_rgb(name, make, color, tmp_path):
    make(tmp_path / name)
    pixels = decoded(tmp_path / name)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (SIZE, SIZE, 3)
    assert np.abs(pixels.astype(int) - color).max() <= 1


def test_a_rotated_photograph_is_turned_upright(tmp_path):
    picture = Image.new("RGB", (16, 16), "black")
    picture.paste("white", (0, 0, 16, 8))  # the upper half as stored
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture.save(tmp_path / "photo.png", exif=exif)
    pixels = decoded(tmp_path / "photo.png")
    assert pixels[:3].max() == 0
    assert pixels[-3:].min() == 255


def test_the_middle_is_cut_out(tmp_path):
    wide = Image.new("RGB", (48, 16), "black")
    wide.paste("white", (16, 0, 32, 16))
    wide.save(tmp_path / "wide.png")
    assert decoded(tmp_path / "wide.png")[:, 1:-1].min() == 255


@pytest.mark.parametrize("damage", ["cut short", "no image", "empty"])
def test_unreadable_files_are_named(damage, folder):
    victim = folder / "cats" / "3.png"
    damaged = {"cut short": victim.read_bytes()[:40], "no image": b"hello", "empty": b""}
    victim.write_bytes(damaged[damage])
    with pytest.raises(UserError, match="1 unreadable image files") as caught:
        load(folder)
    assert str(victim) in str(caught.value)
    assert "remove or replace" in str(caught.value)


def test_unreadable_files_of_train_and_test_are_named_together_and_in_order(
    photographs, tmp_path, monkeypatch
):
    monkeypatch.setenv("RNP_WORKERS", "3")
    victims = [photographs[i] for i in (3, FILES_PER_TASK + 8, -1)]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:60])
    with pytest.raises(UserError, match="3 unreadable image files: ") as caught:
        load(photographs[0].parents[1])
    places = [str(caught.value).index(str(victim)) for victim in victims]
    assert places == sorted(places)


def test_a_decompression_bomb_is_refused_and_the_filters_stay(folder):
    """Its header is enough, in any thread; the warning filters are restored."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 10_000, 10_000, 1, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header
    bomb += struct.pack(">I", zlib.crc32(header))
    (folder / "cats" / "3.png").write_bytes(bomb + struct.pack(">I", 8) + b"IDAT")
    before = list(warnings.filters)
    with pytest.raises(UserError, match=r"1 unreadable .*3.png .*decompression bomb"):
        load(folder)
    assert warnings.filters == before


def test_many_unreadable_files_are_counted(folder):
    for file in folder.glob("*/[01234].png"):
        file.write_bytes(b"x")
    with pytest.raises(UserError, match=r"10 unreadable .* and 7 more"):
        load(folder)


def test_hidden_files_and_other_endings_are_ignored(folder):
    # macOS writes ._0.png beside 0.png
    for name in (".DS_Store", "._0.png", "notes.txt", "Thumbs.db"):
        (folder / "cats" / name).write_bytes(b"no image")
    (folder / ".git").mkdir()
    train, test = load(folder)
    assert len(train) + len(test) == 10


UNMATCHED = ("train/a", "train/b", "test/a", "test/c")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: None, "no folder; set datasets.imagefolder.path"),
        (lambda f: paint(f / "only" / "0.png"), "holds 1 class folders, at least 2 are needed"),
        (lambda f: [paint(f / "a" / "0.png"), (f / "b").mkdir()], "no images in class folder 'b'"),
        (
            lambda f: [paint(f / name / "0.png") for name in UNMATCHED],
            "class folders b, c are in train or in test only",
        ),
        (
            lambda f: [paint(f / name / "0.png") for name in "ab"],
            "images holds 2 images, too few to set 0.2 of them aside",
        ),
    ],
)
def test_unusable_folders_are_refused(change, message, tmp_path):
    change(tmp_path / "images")
    with pytest.raises(UserError) as caught:
        load(tmp_path / "images")
    assert message in str(caught.value)


@pytest.mark.parametrize("options", [{"size": 4}, {"test_share": 0}, {"test_share": 1.5}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(UserError, match=f"imagefolder.{next(iter(options))} must be"):
        ImageFolder(**options)
