"""`rnp detect` on a model of unknown origin: its target label, its triggers, its images."""

import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from rnp.cli.main import cli
from rnp.io.files import read_rows


def detect(scene, quick, task, *options):
    arguments = [str(scene / "model.safetensors"), "--clean", str(scene / "clean")]
    return CliRunner().invoke(
        cli,
        ["detect", task, *arguments, *quick.model, *map(str, options)],
        catch_exceptions=False,
    )


def test_labels(scene, quick):
    """A line per detector, and one more where it also runs on the unlearned model."""
    chosen = ["--detector", "prediction_drift", "--detector", "neural_cleanse_index"]
    result = detect(scene, quick, "labels", *quick.unlearn, *quick.search, *chosen)
    *_, first, second, third, hint = result.output.splitlines()
    assert result.exit_code == 0
    assert [line.split(":")[0] for line in (first, second, third)] == [
        "prediction_drift",
        "neural_cleanse_index",
        "neural_cleanse_index_unlearned",
    ]
    for line in (first, second, third):
        assert re.search(r": (no decision|class \d \(.+\)), margin \d", line)
    assert "not a proof" in hint


def test_triggers(scene, quick, tmp_path):
    """One per class, the smallest first in the table."""
    out = tmp_path / "triggers"
    result = detect(scene, quick, "triggers", *quick.search, "-o", out)
    rows = read_rows(out / "triggers.csv")
    assert result.exit_code == 0
    assert {row["class"] for row in rows} == set(path.name for path in (scene / "clean").iterdir())
    sizes = [float(row["l1"]) for row in rows]
    assert sizes == sorted(sizes)
    masks = load_file(out / "triggers.safetensors")["mask"]
    assert masks.shape == (4, 16, 16), "in the order of the classes"
    assert [masks[int(row["label"])].sum().item() for row in rows] == pytest.approx(sizes, rel=1e-4)
    assert (out / "triggers.png").read_bytes().startswith(b"\x89PNG")
    smallest = f"class {rows[0]['label']} ({rows[0]['class']}): {sizes[0]:.1f} pixels"
    assert smallest in result.output.splitlines()[-4]


def test_samples(scene, quick, tmp_path):
    """A row for each readable image, in the order of their names."""
    for name in ("b", "a", "c"):
        shutil.copy(next((scene / "clean" / "class1").iterdir()), tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    names = ("unlearned_confidence", "strip", "mean_unlearned_confidence")
    chosen = [word for name in names for word in ("--detector", name)]
    out = tmp_path / "out.csv"
    result = detect(scene, quick, "samples", tmp_path, *quick.unlearn, "-o", out, *chosen)
    assert result.exit_code == 0, result.output
    rows = read_rows(out)
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.png", "c.png"]
    assert "broken.png" in result.output
    assert len({row["unlearned_confidence"] for row in rows}) == 1, "three copies of one image"
    for name in names:
        flags = [row[f"{name}_flagged"] for row in rows]
        assert set(flags) <= {"true", "false"}
        assert f"{name}: {flags.count('true')} of 3 images flagged" in result.output


def test_an_unknown_task(scene):
    result = CliRunner().invoke(cli, ["detect", "lables", "model.pth"])
    assert result.exit_code == 2 and "No such command 'lables'" in result.output


def test_an_unknown_detector(scene, quick):
    result = detect(scene, quick, "labels", "--detector", "nothing")
    assert result.exit_code == 2 and "'nothing' is not one of" in result.output
