"""One row per configuration, whatever happened to the store, to MLflow and to the stages before."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import yaml
from click.testing import CliRunner

import stages.publish
from rnp.cli.main import cli
from rnp.errors import UserError
from rnp.io.models import save_model
from rnp.models.build import Architecture
from stages.publish import MARKER, PARENT, publish
from stages.summary import summary

pytestmark = [  # both arise while MLflow imports its own modules
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]
SCORES = {
    "clean_accuracy": 0.87,
    "attack_success_rate": 0.01,
    "robust_accuracy": 0.8,
    "clean_accuracy_before": 0.9,
    "attack_success_rate_before": 1.0,
    "robust_accuracy_before": 0.0,
    "der": 0.98,
    "gate": True,
    "gate_reason": "",
    "neurons_pruned": 12,
    "neurons": 480,
}


def test_first_row(project):
    Path("dvc.lock").write_text(
        "schema: '2.0'\nstages: {poison: {outs: [{path: data/poisoned, md5:"
        " 0123456789abcdef.dir}]}}\n"
    )
    Path("reports").mkdir()
    Path("reports/report.html").write_text("<p>")
    project.pipeline(train=0.1, recover=0.2)
    (row,), children = project.rows(), project.runs()
    assert row.info.status == "FINISHED" and row.info.run_name.startswith("badnets-")
    assert row.data.params == {
        "seed": "0",
        "data.name": "shapes",
        "poison.attack": "badnets",
        "train.lr": "0.1",
        "train.epochs": "3",
        "train.rate.final": "0.5",
        "recover.lr": "0.2",
    }
    seconds = {
        f"time/{stage}": project.run_json(stage)["seconds"] for stage in ("train", "recover")
    }
    assert row.data.metrics == {
        **seconds,
        **{
            f"{stage}/{name}": value
            for stage, lr in (("train", 0.1), ("recover", 0.2))
            for name, value in (("accuracy", lr), ("gate", 1.0), ("inner/asr_5", 0.25))
        },
    }
    assert [child.data.tags[PARENT] for child in children] == [row.info.run_id] * 2
    assert [row.data.tags[f"rnp.run.{stage}"] for stage in ("train", "recover")] == [
        child.info.run_id for child in children
    ]
    assert row.inputs.dataset_inputs[0].dataset.digest == "0123456789abcdef.dir"
    folder = Path(project.store().client.download_artifacts(row.info.run_id, ""))
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.*")} == {
        "config/params.yaml",
        "config/dvc.lock",
        "report/report.html",
        "plots/train/curve.png",
        "plots/recover/curve.png",
    }


def test_a_row_has_the_parameters_in_use(project):
    """An option of an attack that is not chosen is none, and its edit makes no row."""
    attacks = {"badnets": {"size": 3}, "blend": {"alpha": 0.2}}
    project.write({**toy.PARAMS, "attacks": attacks})
    project.pipeline()
    (row,) = project.rows()
    assert row.data.params["attacks.badnets.size"] == "3"
    assert "attacks.blend.alpha" not in row.data.params
    project.write({**toy.PARAMS, "attacks": attacks | {"blend": {"alpha": 0.5}}})
    publish()
    assert len(project.rows()) == 1


def test_edit_and_revert(project):
    project.pipeline(recover=0.2)
    shutil.copytree("reports/recover", "cached")
    project.write({**toy.PARAMS, "recover": {"lr": 0.5}})
    project.stage("recover", lr=0.5)
    publish()
    first, second = project.rows()
    train, recover, again = project.runs()
    assert (
        first.data.tags["rnp.run.train"] == second.data.tags["rnp.run.train"] == train.info.run_id
    )
    assert (
        second.data.metrics["recover/accuracy"] == 0.5
        and second.data.metrics["train/accuracy"] == 0.1
    )
    assert train.data.tags[PARENT] == recover.data.tags[PARENT] == first.info.run_id
    assert again.data.tags[PARENT] == second.info.run_id

    project.write(toy.PARAMS)
    shutil.rmtree("reports/recover")
    Path("cached").rename("reports/recover")
    publish()
    assert len(project.rows()) == 2 and len(project.runs()) == 3
    assert json.loads(MARKER.read_text())["row"][0] == first.info.run_id


def test_nothing_new_asks_no_mlflow(project, capsys, monkeypatch):
    project.pipeline()
    name = project.rows()[0].info.run_name
    capsys.readouterr()
    monkeypatch.setattr(stages.publish, "Store", None)
    publish()
    assert f"row {name}" in capsys.readouterr().out
    code = """if True:
        import sys
        from stages.publish import publish
        publish()
        print({"torch", "mlflow", "numpy"} & set(sys.modules))"""
    assert run_code(code) == "set()"


def test_store_gone(project, crowd):
    """`mlflow.db` and `mlruns` deleted, and the file made anew as `make ui` would."""
    project.pipeline()
    shutil.rmtree("mlruns")
    shutil.copy(crowd[0] / "mlflow.db", project.folder)
    code = """if True:
        from rnp.tracking.store import Store
        from stages.publish import MARKER, publish
        publish()
        MARKER.unlink()
        publish()
        runs = Store().search("")
        kinds = sorted((run.data.tags["rnp.kind"], "rnp.backfill" in run.data.tags) for run in runs)
        print(kinds, len({run.data.tags.get("mlflow.parentRunId") for run in runs}))"""
    # In a process of its own, since here the old file is open.
    assert run_code(code) == "[('pipeline', False), ('stage', True), ('stage', True)] 2"


def run_code(code):
    """The last line that the code prints."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1]


def test_deleted_store_is_noticed(project):
    project.pipeline()
    row = json.loads(MARKER.read_text())["row"][0]
    assert stages.publish.run_exists(project.folder / "mlflow.db", row)
    assert not stages.publish.run_exists(project.folder / "mlflow.db", "another")
    assert not stages.publish.run_exists(project.folder / "gone.db", row)
    assert not Path("gone.db").exists()


def test_server_away_then_back(project, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    project.pipeline(train=0.5)
    assert not MARKER.exists() and "no row" in capsys.readouterr().out
    assert project.run_json("train")["run_id"] is None
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    for _ in range(2):
        publish()
        MARKER.unlink()
    (row,), (train, _) = project.rows(), project.runs()
    assert (
        train.info.run_name == "train-badnets"
        and train.info.status == "FINISHED"
        and "rnp.backfill" in train.data.tags
    )
    assert (
        train.data.tags[PARENT] == row.info.run_id
        and row.data.tags["rnp.run.train"] == train.info.run_id
    )
    history = project.store().client.get_metric_history(train.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [
        (0, 0.5),
        (10, 0.25),
        (20, pytest.approx(0.5 / 3, abs=1e-6)),
    ]
    assert train.data.metrics["final/accuracy"] == 0.5 and train.data.params["train.lr"] == "0.5"


def test_another_store_gets_its_own_row(project, crowd, monkeypatch):
    project.pipeline()
    shutil.copy(crowd[0] / "mlflow.db", "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    publish()
    assert len(project.rows()) == 1 and len(project.runs()) == 2


def test_run_that_mlflow_lost_on_the_way_is_rebuilt(project):
    project.stage("train")
    project.stage("recover")
    store, (train, recover) = project.store(), project.runs()
    store.client.set_terminated(train.info.run_id, "KILLED")
    store.client.delete_run(recover.info.run_id)
    publish()
    (row,) = project.rows()
    rebuilt = {run.info.run_id for run in project.runs() if "rnp.backfill" in run.data.tags}
    assert {row.data.tags["rnp.run.train"], row.data.tags["rnp.run.recover"]} == rebuilt
    assert not rebuilt & {train.info.run_id, recover.info.run_id}


def test_cut_short(project, monkeypatch):
    """A publish that was stopped leaves half a row; the next one leaves a whole one and nothing
    else.
    """

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages.publish, "link_models", stop)
        project.pipeline()
    publish()
    (row,) = project.rows()
    assert row.info.status == "FINISHED"


@pytest.mark.parametrize("do", ["raise", "exit"])
def test_failed_stage_makes_no_row(project, do):
    project.stage("train")
    try:
        project.stage("recover", do)
    except RuntimeError:
        pass
    with pytest.raises(UserError, match=r"reports/recover.*dvc repro"):
        publish()
    assert project.rows() == []


def test_nothing_at_all(project):
    with pytest.raises(UserError, match="dvc repro"):
        publish()


def test_defenses_that_are_no_longer_wanted(project, monkeypatch, tmp_path):
    monkeypatch.setenv("RNP_TRACKING", "off")
    project.stage("train")
    for name in ("fp", "nad"):
        shutil.copytree("reports/train", f"reports/defend/{name}")
    assert [str(stage.report) for stage in stages.publish.finished_stages({"nad": {}})] == [
        "reports/train",
        "reports/defend/nad",
    ]


def test_experiment_in_a_copy(project, monkeypatch, tmp_path):
    """`dvc exp run --temp` and queues: the stage runs elsewhere, the store stays in the project."""
    project.pipeline()
    (train, _), (row,) = project.runs(), project.rows()
    copy = tmp_path / "copy"
    shutil.copytree(project.folder / "reports", copy / "reports")
    monkeypatch.setenv("DVC_ROOT", str(project.folder))
    monkeypatch.setenv("DVC_EXP_NAME", "sunny-day")
    monkeypatch.chdir(copy)
    project.folder = copy
    project.write({**toy.PARAMS, "seed": 1})
    project.stage("recover")
    publish()
    assert not list(copy.glob("ml*"))
    old, new = project.rows()
    assert old.info.run_id == row.info.run_id and new.info.run_name.startswith("sunny-day-")
    assert new.data.tags["rnp.run.train"] == train.info.run_id and len(project.runs()) == 3


def test_models(project):
    architecture = Architecture(arch="resnet10", width=4)
    Path("data/test").mkdir(parents=True)
    np.save("data/test/images.npy", np.zeros((3, 1, 16, 16), np.uint8))
    for name in ("backdoored", "pruned/model"):
        model = architecture.build(
            3, 1, torch.tensor([0.5]), torch.tensor([0.2]), rng=torch.Generator()
        )
        save_model(Path(f"models/{name}.safetensors"), model, architecture, ("a", "b", name))
    project.write({**toy.PARAMS, "prune": {"lr": 0.3}})
    for stage in ("train", "prune"):
        assert project.stage(stage) == 0
    publish()
    (row,), store = project.rows(), project.store()
    runs = dict(zip(("backdoored", "repaired"), project.runs()))
    for name, run in runs.items():
        model = store.client.get_logged_model(row.data.tags[f"rnp.model.{name}"])
        assert (model.name, model.source_run_id) == (name, run.info.run_id)
        assert model.tags["rnp.backdoored"] == str(name == "backdoored").lower()


@pytest.mark.parametrize("gate", [True, False])
def test_summary(gate, capsys):
    summary(
        {"train": 12.34, "prune": 0.5},
        "41,000 forward, 9,000 backward",
        {**SCORES, "gate": gate, "gate_reason": "" if gate else "ASR 0.100 is below 0.8"},
    )
    out = capsys.readouterr().out
    rows = {line[:22].strip(): line[22:].split() for line in out.splitlines()}
    assert rows["clean accuracy"] == ["90.0%", "87.0%"] and rows["attack success rate"] == [
        "100.0%",
        "1.0%",
    ]
    assert rows["DER"] == ["0.980"] and rows["neurons pruned"] == ["12", "of", "480"]
    assert "RNP         41,000 forward, 9,000 backward passes of an image\n" in out
    assert "train 12.3, prune 0.5" in out and "reports/report.html" in out
    assert ("NOT real: ASR 0.100 is below 0.8" in out) is not gate


DVC = {
    "stages": {
        **{
            name: {
                "cmd": (
                    f"{sys.executable} {toy.__file__} {name} --out {name}.txt --report"
                    f" reports/{name}"
                ),
                "params": [name],
                "deps": deps,
                "outs": [f"{name}.txt", f"reports/{name}/run.json"],
                "metrics": [{f"reports/{name}/metrics.json": {"cache": False}}],
                "plots": [{f"reports/{name}/history.csv": {"cache": False}}],
            }
            for name, deps in (("train", ["data.txt"]), ("recover", ["train.txt"]))
        },
        "publish": {
            "cmd": f"{sys.executable} -m stages.publish",
            "always_changed": True,
            "deps": ["recover.txt"],
        },
    },
}


def dvc(*arguments):
    return subprocess.run(["dvc", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def repository(project):
    """The toy as a DVC pipeline under git."""
    Path("dvc.yaml").write_text(yaml.safe_dump(DVC))
    Path("data.txt").touch()
    Path(".gitignore").write_text("mlflow.db*\nmlruns\n.rnp\n")
    subprocess.run(["git", "init", "-q"], check=True)
    dvc("init", "-q")
    subprocess.run(["git", "add", "."], check=True)
    subprocess.run(
        ["git", "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"], check=True
    )
    return project


@pytest.mark.timeout(400)  # nine processes, each of which imports PyTorch and MLflow
def test_repro_experiment_edit(repository):
    dvc("repro")
    dvc("exp", "run", "--temp", "--name", "sunny-day", "-S", "recover.lr=0.7")
    (first, second), (train, _, recover) = repository.rows(), repository.runs()
    assert first.data.params["recover.lr"] == "0.2" and second.data.params["recover.lr"] == "0.7"
    assert (
        second.info.run_name.startswith("sunny-day-")
        and second.data.tags["dvc.exp_name"] == "sunny-day"
    )
    assert (
        first.data.tags["rnp.run.train"] == second.data.tags["rnp.run.train"] == train.info.run_id
    )

    repository.write({**toy.PARAMS, "recover": {"lr": 0.7}})
    output = dvc("repro")
    assert (
        "is cached" in output and second.info.run_name in output
    )  # DVC brings back run.json with the weights
    assert repository.run_json("recover")["run_id"] == recover.info.run_id
    assert len(repository.rows()) == 2 and len(repository.runs()) == 3


@pytest.mark.timeout(400)
def test_dvc_killed_alone(repository):
    """The stage lives on and closes its run; DVC knows nothing of it and will run it again."""
    repository.write({**toy.PARAMS, "train": {"lr": 0.1, "do": "wait"}})
    waiting = Path("reports/train/waiting")
    repro = subprocess.Popen(["dvc", "repro"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not waiting.exists():
        assert repro.poll() is None
        time.sleep(0.1)
    os.kill(repro.pid, signal.SIGKILL)
    repro.wait()
    (run,) = repository.runs()
    assert run.info.status == "RUNNING"  # opening the store for this look must not have ended it
    waiting.unlink()
    deadline = time.monotonic() + 20
    while repository.runs()[0].info.status != "FINISHED":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert not Path("dvc.lock").exists()


def test_setup(repository):
    """The store and the schema of params.yaml; where there is git, DVC uses it."""
    dvc("config", "--local", "core.no_scm", "true")
    for _ in range(2):
        CliRunner().invoke(cli, ["setup"], catch_exceptions=False)
    schema = json.loads(Path(".rnp/params.schema.json").read_text())
    assert "train" in schema["properties"] and Path("mlflow.db").exists()
    assert "no_scm" not in dvc("config", "--local", "--list")
