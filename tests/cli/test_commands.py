"""The commands one after another, on digits and a toy network, without DVC and MLflow; then what
users do wrong.
"""

import dataclasses
import errno
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors import safe_open

from rnp.cli.main import cli, guard
from rnp.errors import UserError
from rnp.io.datasets import load_images, save_images
from rnp.io.files import read_rows, write_rows
from rnp.io.models import load_model
from rnp.io.tensors import load_tensors, save_tensors
from rnp.params.presets import render
from rnp.reporting.page import page

NET = ["--arch", "resnet10", "--width", "4"]
TRAIN = ["--epochs", "1", "--batch-size", "64", "--augment.crop", "0"]
FP32 = ["--precision", "fp32"]
CHAIN = {
    "prepare digits": (
        "--out data --report reports/prepare --size 16 --defense-train 100 --defense-val 100"
    ),
    "benign": (
        "--pool data/pool --test data/test --out models/benign.safetensors --report reports/benign"
        " NET TRAIN"
    ),
    "poison blend": (
        "--pool data/pool --benign models/benign.safetensors --out data/poisoned --report"
        " reports/poison --cover-rate 0.05"
    ),
    "train": (
        "--pool data/pool --poisoned data/poisoned --test data/test"
        " --benign models/benign.safetensors --out models/backdoored.safetensors"
        " --triggered data/triggered --report reports/train NET TRAIN"
    ),
    "unlearn": (
        "--model models/backdoored.safetensors --defense data/defense --out models/unlearned"
        " --report reports/unlearn --epochs 2"
    ),
    "recover": (
        "--unlearned models/unlearned --defense data/defense --out models/recovered --report"
        " reports/recover --steps 4"
    ),
    "prune": (
        "--model models/backdoored.safetensors --masks models/recovered --defense data/defense"
        " --out models/pruned --report reports/prune"
    ),
    "defend ft": (
        "--model models/backdoored.safetensors --defense data/defense --out"
        " models/defended/ft.safetensors --report reports/defend/ft --steps 3"
    ),
    "detect": (
        "--model models/backdoored.safetensors --benign models/benign.safetensors --unlearned"
        " models/unlearned --defense data/defense --test data/test --triggered data/triggered"
        " --pool data/pool --poisoned data/poisoned --out models/triggers.safetensors --report"
        " reports/detect --num-test-images 20 --num-training-images 200 --unlearn.epochs 1"
        " --neural-cleanse.steps 3"
        " --strip.overlays 2"
    ),
    "evaluate": (
        "--test data/test --triggered data/triggered --benign models/benign.safetensors --model"
        " models/backdoored.safetensors --unlearned models/unlearned --masks models/recovered"
        " --pruned models/pruned --defended models/defended --report reports/evaluate --defenses ft"
        " --sweep-images 50"
    ),
}


def arguments(name: str) -> list[str]:
    words = []
    for word in f"{name} {CHAIN[name]}".split():
        words += {"NET": NET, "TRAIN": TRAIN}.get(word, [word])
    return words if name == "prepare digits" else [*words, *FP32]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which every command ran once."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in CHAIN:
            done = CliRunner().invoke(cli, arguments(name), catch_exceptions=False)
            assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A function that calls a command with changed options in a copy of the finished folder."""
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")

    def call(name: str, *extra: str) -> int:
        """`name` as in `CHAIN`; another member of a family takes the options of the one there."""
        family = name.split()[0]
        like = name if name in CHAIN else next(each for each in CHAIN if each.split()[0] == family)
        words = arguments(like)[len(like.split()) :]
        if name not in CHAIN:  # without the options of the member there
            words = [word for word in words if word not in ("--cover-rate", "0.05", "--size", "16")]
        with pytest.raises(SystemExit) as end, guard():
            cli([*name.split(), *words, *extra])
        return end.value.code

    return call


def test_metrics_of_the_whole_chain(finished):
    found = json.loads((finished / "reports/evaluate/metrics.json").read_text())
    for key in (
        "clean_accuracy",
        "attack_success_rate",
        "robust_accuracy",
        "der",
        "clean_accuracy_before",
        "attack_success_rate_before",
        "robust_accuracy_before",
    ):
        assert 0 <= found[key] <= 1
    assert set(found["oracle"]) >= {"clean_accuracy", "attack_success_rate", "neurons_pruned"}
    assert set(found["models"]) == {
        "backdoored",
        "rnp",
        "unlearned",
        "recovered",
        "benign",
        "ft",
        "oracle",
    }
    assert found["n_triggered"] < found["n_clean"]  # no image of the target class
    assert (
        0
        <= json.loads((finished / "reports/train/metrics.json").read_text())["cover_accuracy"]
        <= 1
    )  # there were covers
    chosen = json.loads((finished / "reports/prune/metrics.json").read_text())
    assert found["neurons_pruned"] == chosen["pruned"] <= found["neurons"] * 0.1


def test_the_pruned_model_differs_in_scales_only(finished):
    with (
        safe_open(finished / "models/backdoored.safetensors", "pt") as a,
        safe_open(finished / "models/pruned/model.safetensors", "pt") as b,
    ):
        changed = {k for k in a.keys() if not a.get_tensor(k).equal(b.get_tensor(k))}
        zeroed = sum(int((b.get_tensor(k) == 0).sum()) for k in changed)
    assert all(k.endswith("weight") for k in changed)
    assert zeroed >= json.loads((finished / "reports/prune/metrics.json").read_text())["pruned"]


@pytest.mark.parametrize("name", ["poison blend", "unlearn", "recover", "prune"])
def test_the_same_seed_gives_the_same_bytes(finished, run, name):
    outs = {
        "poison blend": "data/poisoned",
        "unlearn": "models/unlearned",
        "recover": "models/recovered",
        "prune": "models/pruned",
    }
    assert run(name) == 0
    fresh, old = Path(outs[name]), finished / outs[name]
    for file in [fresh] if fresh.is_file() else [f for f in fresh.rglob("*") if f.is_file()]:
        assert (
            file.read_bytes()
            == (old / file.relative_to(fresh) if fresh.is_dir() else old).read_bytes()
        ), file


def test_an_attack_that_poisons_no_image(run):
    """Poisoning writes no image and shows clean ones with the trigger; training edits the model
    that it then writes.
    """
    assert run("poison awp", "--poison-rate", "0.1", "--steps", "2") == 0
    found = json.loads(Path("reports/poison/metrics.json").read_text())
    assert found["poisoned"] == found["covers"] == 0 and 0.4 < found["largest_change"] <= 0.51
    assert (
        len(np.load("data/poisoned/positions.npy")) == 0
        and Path("reports/poison/triggers.png").exists()
    )
    assert run("train") == 0
    rows = read_rows(Path("reports/train/history.csv"))
    assert (
        len(rows) > 1
        and json.loads(Path("data/triggered/attack.json").read_text())["attack"] == "awp"
    )


def test_a_defense_and_its_variant_draw_the_same(run):
    """Where the unlearned model has no say, they are one, byte for byte."""
    words = [
        "--model",
        "models/backdoored.safetensors",
        "--defense",
        "data/defense",
        "--report",
        "reports/defend/x",
        "--steps",
        "3",
    ]
    for name, extra in (
        ("ft", []),
        ("ft_unlearned", ["--channel-fraction", "0", "--unlearn.epochs", "1"]),
    ):
        with guard():
            cli(
                ["defend", name, *words, *extra, "--out", f"{name}.safetensors"],
                standalone_mode=False,
            )
    assert Path("ft.safetensors").read_bytes() == Path("ft_unlearned.safetensors").read_bytes()


def test_a_defense_that_trains_nothing(run):
    """It has no epoch to tell of; DVC wants the history all the same."""
    assert run("defend ft", "--steps", "1") == 0 and read_rows(
        Path("reports/defend/ft/history.csv")
    )
    with guard():
        cli(
            [
                "defend",
                "bnp",
                "--model",
                "models/backdoored.safetensors",
                "--defense",
                "data/defense",
                "--out",
                "bnp.safetensors",
                "--report",
                "reports/defend/bnp",
            ],
            standalone_mode=False,
        )
    assert read_rows(Path("reports/defend/bnp/history.csv")) == []
    found = json.loads(Path("reports/defend/bnp/metrics.json").read_text())
    rows = read_rows(Path("reports/defend/bnp/sweep.csv"))
    assert found["pruned"] == int(rows[-1]["pruned"]) and Path("bnp.safetensors").exists()


def test_a_defense_that_finds_nothing_to_do(run):
    """It leaves the model as it is, with a report that DVC accepts."""
    with guard():
        cli(
            [
                "defend",
                "nc_unlearn",
                "--model",
                "models/backdoored.safetensors",
                "--defense",
                "data/defense",
                "--search.steps",
                "2",
                "--min-index",
                "1e9",
                "--out",
                "same.safetensors",
                "--report",
                "reports/defend/nc_unlearn",
            ],
            standalone_mode=False,
        )
    assert (
        Path("reports/defend/nc_unlearn/history.csv").exists()
        and Path("reports/defend/nc_unlearn/metrics.json").exists()
    )
    before, after = (
        load_model(Path(path))[0].state_dict()
        for path in ("models/backdoored.safetensors", "same.safetensors")
    )
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_another_seed_gives_another_mask(finished, run):
    assert run("recover", "--seed", "1") == 0
    assert (
        Path("models/recovered/mask.safetensors").read_bytes()
        != (finished / "models/recovered/mask.safetensors").read_bytes()
    )


def damage(path: str, keep: float) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * keep)])


def other_architecture() -> None:
    """A model file that claims a width that its weights do not have."""
    tensors, meta = load_tensors(Path("models/backdoored.safetensors"))
    save_tensors(Path("models/backdoored.safetensors"), tensors, meta | {"width": 8})


def relabel(label: int) -> None:
    """All images to optimize on are said to be of one class."""
    data = load_images(Path("data/defense/train"))
    save_images(
        Path("data/defense/train"),
        dataclasses.replace(data, labels=torch.full_like(data.labels, label)),
    )


def rename(path: str) -> None:
    save_images(
        Path(path), dataclasses.replace(load_images(Path(path)), classes=tuple("abcdefghij"))
    )


def gray(path: str) -> None:
    for part in ("train", "val"):
        data = load_images(Path(path) / part)
        save_images(Path(path) / part, dataclasses.replace(data, images=data.images[:, :1]))


MISTAKES = {
    "misspelt option": ("unlearn", ["--lrr", "1"], None, "No such option '--lrr'. (Did you mean"),
    "bad number": ("unlearn", ["--lr", "fast"], None, "'fast' is not a valid float"),
    "out of range": ("recover", ["--steps", "0"], None, "recover.steps must be above 0, got 0"),
    "percent": ("poison blend", ["--poison-rate", "10"], None, "did you mean 0.1?"),
    "target label": (
        "poison blend",
        ["--target-label", "10"],
        None,
        "target_label must be below the number of classes, 10, got 10",
    ),
    "clean-label rate": (
        "poison sig",
        ["--poison-rate", "0.5"],
        None,
        "may take 80 % of them",
    ),
    "missing input": (
        "unlearn",
        ["--model", "gone.safetensors"],
        None,
        "'gone.safetensors' does not exist",
    ),
    "truncated model": (
        "unlearn",
        [],
        lambda: damage("models/backdoored.safetensors", 0.5),
        "is no readable safetensors file",
    ),
    "foreign file": (
        "unlearn",
        ["--model", "reports/prune/metrics.json"],
        None,
        "is no readable safetensors file",
    ),
    "mask for model": (
        "unlearn",
        ["--model", "models/recovered/mask.safetensors"],
        None,
        "holds 'mask', not a model",
    ),
    "other architecture": ("unlearn", [], other_architecture, "the architecture needs"),
    "truncated images": (
        "unlearn",
        [],
        lambda: damage("data/defense/train/images.npy", 0.5),
        "is damaged",
    ),
    "missing images": (
        "unlearn",
        [],
        lambda: Path("data/defense/train/images.npy").unlink(),
        "does not exist; run the stage",
    ),
    "one class alone": (
        "unlearn",
        [],
        lambda: relabel(0),
        "are of class 0; a model that always predicts that class would be right",
    ),
    "one class for another defense": (
        "defend ft",
        [],
        lambda: relabel(3),
        "images to optimize on are of class 3",
    ),
    "other classes": (
        "recover",
        [],
        lambda: rename("data/defense/val"),
        "the defense set has 10 classes (a, b, c, d, e and 5 more)",
    ),
    "other channels": (
        "prune",
        [],
        lambda: gray("data/defense"),
        "images of the defense set are [1, 16, 16]; the model takes 3",
    ),
    "too many images": ("prepare digits", ["--defense-train", "2000"], None, "ask for fewer"),
    "no data set": ("prepare cifar10", [], None, "point RNP_DATA at its folder"),
    "unknown data set": ("prepare cifar", [], None, "did you mean 'cifar10'?"),
    "no folder": ("prepare imagefolder", [], None, "set datasets.imagefolder.path"),
    "unknown defense": ("defend ft", ["--lrr", "1"], None, "No such option '--lrr'. (Did you mean"),
    "no batch norm": ("benign", ["--arch", "resnet-18"], None, "did you mean 'resnet18'?"),
    "device": ("unlearn", [], None, "RNP_DEVICE='abacus' is no device"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_in_one_line_and_exit_code_2(run, capsys, monkeypatch, case):
    name, extra, prepare, message = MISTAKES[case]
    if prepare is not None:
        prepare()
    if case == "device":
        monkeypatch.setenv("RNP_DEVICE", "abacus")
    before = snapshot()
    assert run(name, *extra) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert (
        "Traceback" not in error
        and len([line for line in error.splitlines() if line.lower().startswith("error")]) == 1
    )
    assert snapshot() == before, "something was half-written"


def snapshot() -> dict[str, int]:
    return {
        str(file): file.stat().st_mtime_ns
        for folder in ("data", "models")
        for file in Path(folder).rglob("*")
    }


def test_a_stop_that_is_never_reached_is_told_and_still_writes_a_model(run, capsys):
    assert run("unlearn", "--stop-accuracy", "0.0001", "--epochs", "1") == 0
    assert "accuracy never fell to 0.0001" in capsys.readouterr().out
    assert json.loads(Path("reports/unlearn/metrics.json").read_text())["reached"] is False
    assert Path("models/unlearned/model.safetensors").exists()


def test_scattered_wrong_labels_are_told(run, capsys):
    data = load_images(Path("data/defense/val"))
    save_images(Path("data/defense/val"), dataclasses.replace(data, labels=data.labels.flip(0)))
    assert run("unlearn", "--epochs", "1") == 0
    assert "near chance" in (said := capsys.readouterr().err) or "sure of another class" in said, (
        said
    )


def test_a_non_finite_loss_ends_in_one_line(run, capsys):
    before = snapshot()
    assert run("benign", "--lr", "1e30") == 1
    assert "the loss became non-finite at step" in capsys.readouterr().err
    assert snapshot() == before


def test_a_full_disk_leaves_the_old_files(run, capsys, monkeypatch):
    before = Path("models/pruned/model.safetensors").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "models/pruned/model.safetensors")

    monkeypatch.setattr("rnp.io.tensors.save_file", full)
    assert run("prune") == 1
    assert "the disk is full: models/pruned/model.safetensors" in capsys.readouterr().err
    assert Path("models/pruned/model.safetensors").read_bytes() == before
    assert [f for f in Path("models").rglob(".*")] == []


@pytest.fixture
def ended(run):
    """The finished chain with what stages leave beside it: run.json and params.yaml."""
    for stage in ("poison", "train", "unlearn", "recover", "prune", "detect", "defend/ft"):
        Path(f"reports/{stage}/run.json").write_text(
            '{"seconds": 1.5, "device": "a loom", "params": {"seed": 3}}'
        )
    Path("params.yaml").write_text(
        "preset: demo\nseed: 3\ndata: {name: shapes}\npoison: {attack: blend}\nrecover: {lr: 0.2}\n"
    )
    return lambda *arguments: CliRunner().invoke(cli, ["collect", "rows.csv", *arguments])


def test_rows_of_results(ended):
    for defense in ("rnp", "ft", "none", "rnp"):
        assert ended("--defense", defense).exit_code == 0
    rows = {row["defense"]: row for row in read_rows(Path("rows.csv"))}
    assert list(rows) == ["ft", "none", "rnp"] and {
        (row["seed"], row["attack"]) for row in rows.values()
    } == {("3", "blend")}
    assert (
        float(rows["rnp"]["seconds_unlearn"]) == 1.5
        and rows["none"]["seconds_unlearn"] == rows["none"]["der"] == ""
    )
    assert [rows[name]["seconds"] for name in ("rnp", "ft", "none")] == ["4.5", "1.5", ""]
    given = json.loads(Path("reports/prepare/metrics.json").read_text())
    assert {rows[name]["clean_images"] for name in ("rnp", "ft")} == {
        str(given["defense_train"] + given["defense_val"])
    }
    assert {row["device"] for row in rows.values()} == {"a loom"}, (
        "the machine of the run, not this one"
    )
    assert (
        rows["none"]["clean_accuracy"]
        == rows["rnp"]["clean_accuracy_before"]
        == rows["ft"]["clean_accuracy_before"]
    )
    assert rows["rnp"]["settings"] != rows["ft"]["settings"] and rows["rnp"]["n_clean"] != ""


def test_rows_of_detection(ended):
    for _ in range(2):  # the second takes the place of the first
        done = CliRunner().invoke(
            cli, ["collect", "detection.csv", "--kind", "detection"], catch_exceptions=False
        )
        assert done.exit_code == 0
    every = read_rows(Path("detection.csv"))
    training = {row["detector"]: row for row in every if row["setting"] == "training"}
    rows = {
        (row["task"], row["detector"], row["model"]): row
        for row in every
        if row["setting"] == "test"
    }
    assert len(every) == len(training) + len(rows)
    assert set(training) == {
        "training_loss",
        *(detector for task, detector, _ in rows if task == "samples"),
    }
    assert all(
        0 <= float(row["auroc"]) <= 1 and 0.05 < float(row["base_rate"]) < 0.2
        for row in training.values()
    )
    assert set(rows) == {
        *(("triggers", "neural_cleanse", model) for model in ("backdoored", "unlearned")),
        *(
            ("labels", name, "unlearned")
            for name in ("prediction_drift", "trigger_survival", "consensus")
        ),
        ("labels", "latent_trigger", "backdoored"),
        *(
            ("labels", name, model)
            for name in ("mm_bd", "neural_cleanse_index", "trigger_size")
            for model in ("backdoored", "unlearned")
        ),
        *(
            ("samples", name, "unlearned")
            for name in ("unlearned_confidence", "unlearned_mahalanobis")
        ),
        *(
            ("samples", name, "backdoored")
            for name in (
                "mahalanobis",
                "strip",
                "badexpert",
                "spectral_signatures",
                "activation_clustering",
            )
        ),
    }
    assert 0 <= float(rows["samples", "strip", "backdoored"]["auroc"]) <= 1
    assert rows["labels", "mm_bd", "backdoored"]["label_correct"] in ("true", "false")
    assert float(rows["triggers", "neural_cleanse", "unlearned"]["l1"]) > 0
    assert all(row["seconds"] for row in rows.values())


def test_rows_of_the_benign_model(run, ended):
    """Each label detected there is wrong; results on its unlearned copy have a suffix."""
    assert (
        run(
            "detect",
            "--include-benign",
            "--num-training-images",
            "0",
            "--labels",
            "prediction_drift",
            "--labels",
            "neural_cleanse_index",
        )
        == 0
    )
    assert (
        CliRunner()
        .invoke(cli, ["collect", "detection.csv", "--kind", "detection"], catch_exceptions=False)
        .exit_code
        == 0
    )
    rows = read_rows(Path("detection.csv"))
    benign = {row["detector"]: row for row in rows if row["model"] == "benign"}
    assert set(benign) == {
        "prediction_drift",
        "neural_cleanse_index",
        "neural_cleanse_index_unlearned",
    }
    assert all(
        (row["label"] == "-1") == (row["label_correct"] == "true") and row["task"] == "labels"
        for row in benign.values()
    )
    assert not any(row["setting"] == "training" for row in rows)


def test_rows_of_removal(ended):
    """A row per defense in the table of detection, whose rows it leaves there."""
    for option in ("detection", "removal"):
        assert (
            CliRunner()
            .invoke(cli, ["collect", "detection.csv", "--kind", option], catch_exceptions=False)
            .exit_code
            == 0
        )
    rows = read_rows(Path("detection.csv"))
    found = {(row["detector"], row["model"]): row for row in rows if row["task"] == "removal"}
    assert set(found) == {("ft", "backdoored"), ("rnp", "unlearned")} and len(rows) > 2
    measured = json.loads(Path("reports/evaluate/metrics.json").read_text())["models"]
    for (name, _), row in found.items():
        assert [
            float(row[key]) for key in ("clean_accuracy", "attack_success_rate", "der")
        ] == pytest.approx(
            [measured[name][key] for key in ("clean_accuracy", "attack_success_rate", "der")],
            abs=1e-4,
        )
        assert float(row["seconds"]) == (4.5 if name == "rnp" else 1.5) and row["setting"] == "test"


def test_a_variant_is_a_row_of_its_defense(ended):
    """`ft` with the unlearned model; a run of it with other options makes no row."""
    path = Path("reports/evaluate/metrics.json")
    found = json.loads(path.read_text())
    found["models"]["ft_unlearned"] = found["models"]["ft"]
    path.write_text(json.dumps(found))
    Path("reports/defend/ft_unlearned").mkdir()
    Path("reports/defend/ft_unlearned/metrics.json").write_text("{}")
    Path("reports/defend/ft_unlearned/run.json").write_text(
        '{"seconds": 2.5, "params": {"seed": 3, "defenses.ft_unlearned.unlearn.lr": 0.1}}'
    )
    assert ended("--kind", "removal").exit_code == 0
    rows = {
        row["model"]: row["seconds"]
        for row in read_rows(Path("rows.csv"))
        if row["detector"] == "ft"
    }
    assert rows == {"backdoored": "1.5", "unlearned": "2.5"}
    params = yaml.safe_load(Path("params.yaml").read_text()) | {
        "defenses": {"ft_unlearned": {"unlearn": {"lr": 0.2}}}
    }
    Path("params.yaml").write_text(yaml.safe_dump(params))
    done = ended("--kind", "removal")
    assert isinstance(
        done.exception, UserError
    ) and "ran with defenses.ft_unlearned.unlearn.lr 0.1, params.yaml says 0.2" in str(
        done.exception
    )


@pytest.mark.parametrize(
    "tuned, correct", [("0", "true"), ("3 0", "true"), ("10", "false"), ("", "false")]
)
def test_a_row_of_removal_says_whether_the_target_was_tuned_against(tuned, correct, ended):
    path = Path("reports/defend/ft/metrics.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tuned_labels": tuned}))
    assert ended("--kind", "removal").exit_code == 0
    rows = {row["detector"]: row for row in read_rows(Path("rows.csv"))}
    assert (rows["ft"]["label"], rows["ft"]["label_correct"]) == (tuned, correct)
    assert (rows["rnp"]["label"], rows["rnp"]["label_correct"]) == ("", "")


def test_without_one_target_the_tuned_labels_are_neither_right_nor_wrong(ended):
    path = Path("reports/defend/ft/metrics.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tuned_labels": "3"}))
    path = Path("reports/evaluate/metrics.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_label": None}))
    assert ended("--kind", "removal").exit_code == 0
    rows = {row["detector"]: row for row in read_rows(Path("rows.csv"))}
    assert (rows["ft"]["label"], rows["ft"]["label_correct"]) == ("3", "")


def test_rows_of_controls(ended):
    """Counts as they are, measures to five digits; a second time the rows take the place of the
    first.
    """
    Path("reports/controls").mkdir()
    Path("reports/controls/run.json").write_text('{"seconds": 1.5, "params": {"seed": 3}}')
    write_rows(
        Path("reports/controls/rows.csv"),
        [
            {
                "control": "reinfection",
                "model": "benign",
                "amount": 5,
                "neurons_pruned": "",
                "clean_accuracy": 0.1234567,
                "seconds": 2.0,
            }
        ],
    )
    for _ in range(2):
        assert (
            CliRunner()
            .invoke(cli, ["collect", "controls.csv", "--kind", "controls"], catch_exceptions=False)
            .exit_code
            == 0
        )
    (row,) = read_rows(Path("controls.csv"))
    assert (row["attack"], row["seed"], row["control"], row["model"], row["amount"]) == (
        "blend",
        "3",
        "reinfection",
        "benign",
        "5",
    )
    assert (
        row["clean_accuracy"] == "0.12346" and row["neurons_pruned"] == "" and row["n_clean"] != ""
    )


@pytest.mark.parametrize(
    "name, words",
    [
        ("--samples", "unknown detector 'strop'; did you mean 'strip'"),
        ("--labels", "unknown detector"),
    ],
)
def test_unknown_detectors_are_named(run, capsys, name, words):
    assert run("detect", name, "strop") == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize(
    "stage, params, message",
    [
        (
            "recover",
            {"recover.lr": 0.1},
            "recover ran with recover.lr 0.1, params.yaml says 0.2; run `dvc repro` first",
        ),
        (
            "poison",
            {"poison.attack": "sig"},
            "poison ran with poison.attack sig, params.yaml says blend",
        ),
        ("train", {"seed": 4}, "train ran with seed 4, params.yaml says 3"),
    ],
)
def test_reports_of_other_settings_make_no_row(stage, params, message, ended):
    Path(f"reports/{stage}/run.json").write_text(json.dumps({"seconds": 1.5, "params": params}))
    done = ended()
    assert (
        isinstance(done.exception, UserError)
        and message in str(done.exception)
        and not Path("rows.csv").exists()
    )


@pytest.mark.parametrize("change", [{"attack": "sig"}, {"model": "0" * 64}])
def test_an_evaluation_of_another_model_makes_no_row(change, ended):
    """The stages before it ran anew, then something failed: what lies there is of the run
    before.
    """
    path = Path("reports/evaluate/metrics.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    done = ended()
    assert (
        isinstance(done.exception, UserError)
        and "measured another model" in str(done.exception)
        and not Path("rows.csv").exists()
    )


def test_no_row_for_a_defense_that_did_not_run(ended):
    done = ended("--defense", "anp")
    assert isinstance(done.exception, UserError) and "no defense 'anp'; choose from none, " in str(
        done.exception
    )


def test_no_file_of_the_chain_is_a_pickle(finished):
    for file in finished.rglob("*"):
        if file.is_file():
            assert file.suffix in {".npy", ".json", ".csv", ".png", ".safetensors"}
            if file.suffix == ".npy":
                np.load(file, allow_pickle=False)


def test_controls_of_a_finished_run(run, monkeypatch):
    """Each control gives its rows. By this clock all takes as long as fifty steps of fine-
    tuning.
    """
    clock = itertools.count()
    monkeypatch.setattr("rnp.clock.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    given = yaml.safe_load(render("demo"))
    given["poison"]["attack"] = "blend"
    done = CliRunner().invoke(
        cli,
        [
            "controls",
            "--model",
            "models/backdoored.safetensors",
            "--benign",
            "models/benign.safetensors",
            "--pruned",
            "models/pruned",
            *(
                word
                for name in ("defense", "pool", "poisoned", "test", "triggered")
                for word in (f"--{name}", f"data/{name}")
            ),
            "--report",
            "reports/controls",
            "--unlearn.epochs",
            "1",
            "--recover.steps",
            "2",
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    rows = read_rows(Path("reports/controls/rows.csv"))
    page(Path("reports"), given, Path("report.html"))
    assert (
        "which was never backdoored" in (text := Path("report.html").read_text())
        and "repaired 50" in text
    )
    found = {(row["control"], row["model"], int(row["amount"])): row for row in rows}
    assert len(found) == len(rows) == 1 + 2 * 4 + 1 + 3 + 1
    assert set(found) == {
        ("benign", "benign", 200),
        ("distribution_shift", "backdoored", 200),
        ("equal_time", "backdoored", 50),
        *(
            ("reinfection", model, amount)
            for model in ("repaired", "benign")
            for amount in (1, 5, 10, 50)
        ),
        *(("defense_size", "backdoored", amount) for amount in (100, 50, 10)),
    }
    assert all(0 <= float(row["attack_success_rate"]) <= 1 and row["seconds"] for row in rows)
    assert (
        found["benign", "benign", 200]["neurons_pruned"] != ""
        and found["reinfection", "benign", 1]["neurons_pruned"] == ""
    )
