"""The rows of a run: only of what ran with the parameters of today, and of the kind asked for."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from rnp.cli.main import cli
from rnp.errors import UserError
from rnp.io.files import read_rows, write_json, write_rows
from rnp.reporting.columns import SCHEMAS
from rnp.reporting.rows import require_current

PARAMS = {
    "preset": "demo",
    "seed": 3,
    "precision": "auto",
    "data": {"name": "shapes"},
    "datasets": {"shapes": {"size": 32}, "digits": {"size": 8}},
    "poison": {"attack": "badnets"},
    "attacks": {"badnets": {"size": 3}, "blend": {"alpha": 0.2}},
    "train": {"lr": 0.2, "augment": {"crop": 4}},
    "detect": {"labels": ["mm_bd"], "mm_bd": {"steps": 30}},
    "defenses": {"ft": {"lr": 0.01}},
}
TRAINED = {
    "clean_accuracy": 0.9,
    "attack_success_rate": 1.0,
    "robust_accuracy": 0.0,
    "clean_accuracy_benign": 0.91,
    "n_clean": 100,
    "n_triggered": 90,
    "gate": True,
    "model": "0123",
}


@pytest.mark.parametrize(
    "recorded",
    [
        {"seed": 3, "precision": "auto", "poison.attack": "badnets", "attacks.badnets.size": 3},
        {"train.lr": 0.2, "train.augment.crop": 4},
        {"detect.labels": ("mm_bd",)},
        {"train.momentum": 0.5},
        {},
    ],
    ids=["top level and attack", "nested", "tuple and list", "a default", "nothing"],
)
def test_a_run_with_the_parameters_of_today_counts(recorded):
    require_current("train", recorded, PARAMS)


@pytest.mark.parametrize(
    "stage, recorded, message",
    [
        ("train", {"train.lr": 0.1}, "train ran with train.lr 0.1, params.yaml says 0.2"),
        ("train", {"seed": 4}, "train ran with seed 4, params.yaml says 3"),
        ("train", {"precision": "fp32"}, "precision fp32, params.yaml says auto"),
        ("poison", {"poison.attack": "sig"}, "poison.attack sig, params.yaml says badnets"),
        ("poison", {"attacks.badnets.size": 5}, "attacks.badnets.size 5, params.yaml says 3"),
        ("defend/ft", {"defenses.ft.lr": 0.1}, "defend/ft ran with defenses.ft.lr 0.1"),
        ("detect", {"detect.labels": ["mm_bd", "consensus"]}, "detect.labels"),
    ],
)
def test_a_run_with_other_parameters_is_refused(stage, recorded, message):
    with pytest.raises(UserError) as error:
        require_current(stage, recorded, PARAMS)
    assert message in str(error.value) and str(error.value).endswith("; run `dvc repro` first")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run, as far as its control experiments; calls `rnp collect` in its folder."""
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS))
    recorded = {"seed": 3, "precision": "auto"}
    for stage in ("poison", "train", "unlearn", "recover", "prune", "detect", "controls"):
        record = {"stage": stage, "seconds": 1.5, "params": recorded, "device": "a loom"}
        write_json(Path("reports", stage, "run.json"), record)
    write_json(Path("reports/train/metrics.json"), TRAINED)
    strip = {"auroc": 0.9, "needs_unlearned": False}
    detection = {
        "triggers": {"unlearned": {"success": 0.97, "l1": 7.1}},
        "labels": {"mm_bd": {"label": 1, "margin": 0.5, "correct": True}},
        "benign_labels": {"mm_bd_unlearned": {"label": 2, "margin": 0.1, "correct": False}},
        "samples": {"strip": strip},
        "training_samples": {"strip": strip | {"auroc": 0.8}},
    }
    write_json(Path("reports/detect/metrics.json"), detection)
    times = {"triggers_unlearned": 1.0, "labels_mm_bd": 2.0, "samples_strip": 4.0}
    write_json(Path("reports/detect/seconds.json"), times)
    control = {"control": "benign", "model": "benign", "amount": 500, "der": 0.12345678}
    write_rows(Path("reports/controls/rows.csv"), [control])

    def collect(*arguments):
        command = ["collect", "table.csv", *arguments]
        CliRunner().invoke(cli, command, catch_exceptions=False)
        return read_rows(Path("table.csv"))

    return collect


def test_a_row_of_the_backdoored_model(run):
    (row,) = run("--defense", "none")
    assert tuple(row) == SCHEMAS["defenses"].columns
    assert (row["attack"], row["seed"], row["gate"], row["device"]) == (
        "badnets",
        "3",
        "true",
        "a loom",
    )
    assert row["clean_accuracy"] == row["clean_accuracy_before"] == "0.9"
    assert len(run("--defense", "none")) == 1, "it replaces the older row"


def test_rows_of_detection(run):
    rows = {
        (row["task"], row["detector"], row["model"], row["setting"]): row
        for row in run("--kind", "detection")
    }
    assert set(rows) == {
        ("triggers", "neural_cleanse", "unlearned", "test"),
        ("labels", "mm_bd", "backdoored", "test"),
        ("labels", "mm_bd_unlearned", "benign", "test"),
        ("samples", "strip", "backdoored", "test"),
        ("samples", "strip", "backdoored", "training"),
    }
    trigger = rows["triggers", "neural_cleanse", "unlearned", "test"]
    assert (trigger["attack_success_rate"], trigger["l1"]) == ("0.97", "7.1")
    assert trigger["seconds"] == "1"
    label = rows["labels", "mm_bd", "backdoored", "test"]
    assert (label["label_correct"], label["label"], label["seconds"]) == ("true", "1", "2")
    assert rows["samples", "strip", "backdoored", "training"]["seconds"] == ""


def test_rows_of_controls(run):
    (row,) = run("--kind", "controls")
    assert (row["control"], row["model"], row["amount"]) == ("benign", "benign", "500")
    assert row["der"] == "0.12346" and row["n_clean"] == "100"


def test_options_that_are_not_in_use_change_no_settings(run):
    (before,) = run("--kind", "controls")
    params = json.loads(json.dumps(PARAMS))
    params["attacks"]["blend"]["alpha"] = 0.5
    params["datasets"]["digits"]["size"] = 9
    Path("params.yaml").write_text(yaml.safe_dump(params))
    assert run("--kind", "controls")[0]["settings"] == before["settings"]
    params["attacks"]["badnets"]["size"] = 4
    Path("params.yaml").write_text(yaml.safe_dump(params))
    assert run("--kind", "controls")[0]["settings"] != before["settings"]


def test_a_defense_goes_with_its_kind_alone(run):
    with pytest.raises(UserError, match="--defense goes with --kind defenses"):
        run("--kind", "detection", "--defense", "ft")


def test_a_table_of_another_kind_is_refused(run):
    run("--kind", "controls")
    with pytest.raises(UserError, match="other columns"):
        run("--kind", "detection")
