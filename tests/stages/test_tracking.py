"""What MLflow records of a stage, and that no failure of MLflow reaches the stage."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import mlflow
import pytest
import torch
import toy
from mlflow import MlflowClient

import stages.publish
import stages.stage
from rnp.io.models import load_model, save_model
from rnp.models.build import Architecture
from rnp.params.schema import check_params
from rnp.reporting.provenance import provenance
from rnp.tracking.models import log_model
from rnp.tracking.stage_run import SIGNALS, stage_run
from rnp.tracking.store import flat, safe_name, setup, store_uri, tags

pytestmark = [  # both arise while MLflow imports its own modules
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
    pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType"),
]


def metrics(store, run_id, name):
    return [(m.step, m.value) for m in store.client.get_metric_history(run_id, name)]


def artifact(store, run, path):
    return Path(store.client.download_artifacts(run.info.run_id, path)).read_text()


def test_stage(project):
    assert project.stage("train", lr=0.5) == 0
    (run,) = project.runs()
    store = project.store()
    assert run.info.status == "FINISHED" and run.info.run_name == "train-badnets"
    recorded = {"seed": 0, "train.lr": 0.5, "train.epochs": 3, "train.rate.final": 0.5}
    assert run.data.params == {name: str(value) for name, value in recorded.items()}
    assert metrics(store, run.info.run_id, "loss") == [
        (0, 0.5),
        (10, 0.25),
        (20, pytest.approx(0.5 / 3)),
    ]
    assert metrics(store, run.info.run_id, "share of _1") == [(0, 0.1), (10, 0.1), (20, 0.1)]
    ends = {name: value for name, value in run.data.metrics.items() if name.startswith("final/")}
    assert ends == {"final/accuracy": 0.5, "final/gate": 1, "final/inner/asr_5": 0.25}
    assert [f.path for f in store.client.list_artifacts(run.info.run_id, "plots")] == [
        "plots/curve.png"
    ]
    assert project.run_json("train") == {
        "stage": "train",
        "run_id": run.info.run_id,
        "seconds": run.data.metrics["seconds"],
        "params": recorded,
        **provenance(),
    }


def test_tags(project, monkeypatch):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "params.yaml"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    monkeypatch.setenv("DVC_EXP_NAME", "sunny-day")
    project.stage("train")
    project.write({**toy.PARAMS, "seed": 1})
    project.stage("recover")
    before, after = (run.data.tags for run in project.runs())
    assert (before["rnp.git"], after["rnp.git"]) == (commit, f"{commit}-dirty")
    assert (
        after["mlflow.source.git.commit"] == commit
        and after["mlflow.source.name"] == "stages.recover"
    )
    assert (
        after["rnp.stage"] == after["dvc.stage"] == "recover"
        and after["dvc.exp_name"] == "sunny-day"
    )
    assert (after["rnp.host"], after["rnp.pid"]) == (socket.gethostname(), str(os.getpid()))
    assert before["rnp.key"] != after["rnp.key"] and "dvc.baseline_rev" not in after


def test_a_leftover_run_id_does_not_merge_stages(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    project.stage("train")
    project.stage("recover")
    assert len(project.runs()) == 2


@pytest.fixture
def interruptible():
    """Default handlers: shells let background jobs ignore Ctrl-C, which stages respect."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "do, status, code",
    [
        ("raise", "FAILED", RuntimeError),
        ("exit", "FAILED", 4),
        ("SIGTERM", "KILLED", 143),
        ("SIGINT", "KILLED", 130),
        ("SIGHUP", "KILLED", 129),
    ],
)
def test_a_stage_that_ends_early(project, do, status, code, interruptible):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    if code is RuntimeError:
        with pytest.raises(RuntimeError, match="no luck"):
            project.stage("train", do)
    else:
        assert project.stage("train", do) == code
    (run,) = project.runs()
    assert run.info.status == status and run.info.end_time
    assert len(metrics(project.store(), run.info.run_id, "loss")) == 3  # what was known is not lost
    if status == "FAILED":
        assert do in artifact(project.store(), run, "error.txt")
    assert not Path("reports/train/run.json").exists()
    assert handlers == [signal.getsignal(number) for number in SIGNALS]


def test_what_nohup_ignores_stays_ignored(bare, monkeypatch):
    monkeypatch.setenv("RNP_TRACKING", "off")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stage_run("train", {}, "badnets"):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_killed_without_a_word(project):
    command = [
        sys.executable,
        toy.__file__,
        "train",
        "--lr",
        "0.1",
        "--do",
        "die",
        "--out",
        "m",
        "--report",
        "reports/train",
    ]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    client = MlflowClient(store_uri())
    experiment = client.get_experiment_by_name("rnp").experiment_id
    (dead,) = client.search_runs([experiment])
    assert dead.info.status == "RUNNING"
    labels = tags("stage", "recover", "")
    living = client.create_run(
        experiment, tags={**labels, "rnp.pid": str(os.getppid())}
    ).info.run_id
    elsewhere = client.create_run(
        experiment, tags={**dead.data.tags, "rnp.host": "elsewhere"}
    ).info.run_id
    half_a_row = client.create_run(
        experiment, tags={**dead.data.tags, "rnp.kind": "pipeline"}
    ).info.run_id
    project.store()
    statuses = {run.info.run_id: run.info.status for run in client.search_runs([experiment])}
    assert statuses == {dead.info.run_id: "KILLED", living: "RUNNING", elsewhere: "RUNNING"}
    assert client.get_run(half_a_row).info.lifecycle_stage == "deleted"


def test_a_short_stage_leaves_its_run_to_publish(project, monkeypatch):
    monkeypatch.setattr("rnp.tracking.stage_run.LIVE_AFTER", 60)
    assert project.stage("train", lr=0.5) == 0
    assert project.run_json("train")["run_id"] is None and project.runs() == []
    stages.publish.publish()
    (run,) = project.runs()
    assert run.data.tags["rnp.backfill"] and metrics(project.store(), run.info.run_id, "loss")[
        0
    ] == (0, 0.5)
    assert project.stage("recover", "SIGTERM") == 143
    assert [run.info.status for run in project.runs()] == [
        "FINISHED",
        "KILLED",
    ], "what ends early leaves no files"


def test_a_stage_shows_up_once_it_has_lasted(project, monkeypatch):
    monkeypatch.setattr("rnp.tracking.stage_run.LIVE_AFTER", 60)
    with stage_run("train", {}, "badnets") as run:
        run.row({"step": 0, "loss": 1.0})
        assert run.id is None
        run.start, run.sent = run.start - 100, run.sent - 100
        run.row({"step": 1, "loss": 0.5})
        (opened,) = project.runs()
        assert metrics(project.store(), run.id, "loss") == [(0, 1.0), (1, 0.5)]
        assert time.time() - opened.info.start_time / 1000 > 90, "it began when the stage did"


def test_usage_error_opens_no_run(project, capsys):
    assert project.stage("train", lr="much") == 2
    assert "much" in capsys.readouterr().err
    assert project.runs() == []


def test_bad_parameters_end_before_the_work(project, capsys, monkeypatch):
    monkeypatch.setattr(stages.stage, "check_params", check_params)
    assert project.stage("train") == 2
    assert "params.yaml" in capsys.readouterr().err
    assert project.runs() == [] and not Path("train.txt").exists()


def test_sub_command(project, monkeypatch):
    group = click.Group("defend", {"fp": toy.stage("fp")})
    project.write({**toy.PARAMS, "defenses": {"fp": {"lr": 0.7}}})
    arguments = ["fp", "--out", "fp.txt", "--report", "reports/defend/fp"]
    monkeypatch.setattr(sys, "argv", ["defend", *arguments])
    monkeypatch.setenv("DVC_STAGE", "defend@fp")
    stages.stage.main(group, family="defenses")
    (run,) = project.runs()
    assert run.data.tags["rnp.stage"] == "defend/fp" and run.info.run_name == "defend/fp-badnets"
    assert run.data.params["defenses.fp.lr"] == "0.7"
    monkeypatch.setattr(sys, "argv", ["defend"])
    with pytest.raises(SystemExit) as end:
        stages.stage.main(group, family="defenses")
    assert end.value.code == 2


def test_off(project, monkeypatch, capsys):
    monkeypatch.setenv("RNP_TRACKING", "off")
    assert project.stage("train") == 0
    assert project.run_json("train")["run_id"] is None and capsys.readouterr().err == ""
    monkeypatch.delenv("RNP_TRACKING")
    assert project.runs() == []


@pytest.fixture
def silent():
    """A server that accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://name:secret@127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://name:secret@127.0.0.1:{port}"


@pytest.fixture
def busy():
    """A server that asks to come back in an hour."""
    answer = (
        b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3600\r\nContent-Length: 0\r\nConnection:"
        b" close\r\n\r\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://name:secret@127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("kind", ["refusing", "silent", "busy"])
def test_unreachable_server_costs_seconds(bare, kind, request, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue(kind))
    start = time.monotonic()
    assert bare.stage("train") == 0
    assert time.monotonic() - start < 10
    assert bare.run_json("train")["run_id"] is None
    (warning,) = capsys.readouterr().err.splitlines()
    assert "MLflow" in warning and "secret" not in warning


def test_store_of_the_old_kind(bare, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    assert bare.stage("train") == 0
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_store_that_breaks_on_the_way(project, capsys):
    with stage_run("train", {}, "badnets") as run:
        run.store.client.log_batch = lambda *_, **__: 1 / 0
        run.row({"step": 0, "loss": 1.0})
        run.results(Path("reports"), {"seconds": 1.0})
    assert len(capsys.readouterr().err.splitlines()) == 1
    (run,) = project.runs()
    assert run.info.status != "FINISHED"


def test_two_start_at_once(crowd):
    folder, codes, words = crowd
    assert codes == [0, 0] and words == ["", ""]
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("crowd")
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    assert {
        len(client.get_metric_history(run.info.run_id, name))
        for run in runs
        for name in ("loss", "accuracy")
    } == {2000}


def test_setup_creates_the_store_once(project):
    setup()
    setup()
    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    assert (
        client.get_experiment_by_name("rnp").artifact_location
        == (project.folder / "mlruns").as_uri()
    )


def test_the_experiment_is_one_of_model_training(project):
    """By this tag MLflow opens it in the view with training runs, not in that for GenAI."""
    tag, kind = "mlflow.experimentKind", "custom_model_development"
    assert tags_of_experiment(project)[tag] == kind


def test_an_experiment_without_a_kind_gets_one(project):
    client = MlflowClient(f"sqlite:///{project.folder / 'mlflow.db'}")
    experiment = client.create_experiment("rnp", (project.folder / "mlruns").as_uri())
    assert tags_of_experiment(project)["mlflow.experimentKind"] == "custom_model_development"
    client.set_experiment_tag(experiment, "mlflow.experimentKind", "finetuning")
    assert tags_of_experiment(project)["mlflow.experimentKind"] == "finetuning", "chosen by hand"


def tags_of_experiment(project):
    """Those that it has once the store is open."""
    return project.store().client.get_experiment_by_name("rnp").tags


def test_uri(bare, monkeypatch):
    root = bare.folder
    assert store_uri() == f"sqlite:///{root}/mlflow.db"
    monkeypatch.setenv("DVC_ROOT", "/the/project")
    assert store_uri() == "sqlite:////the/project/mlflow.db"
    for given, wanted in (
        ("sqlite:///runs/x.db", "sqlite:////the/project/runs/x.db"),
        ("sqlite:////abs.db", "sqlite:////abs.db"),
        ("http://host", "http://host"),
    ):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert store_uri() == wanted


def test_moved_project(project, tmp_path, monkeypatch, capsys):
    project.stage("train")
    project.folder = project.folder.rename(tmp_path / "elsewhere")
    monkeypatch.chdir(project.folder)
    assert project.stage("train") == 0
    assert "delete" in capsys.readouterr().err and not (tmp_path / "a project").exists()


@pytest.mark.parametrize(
    "name, wanted", [("asr@5", "asr_5"), ("class 1/größe", "class 1/gr__e"), ("a.b-c:d", "a.b-c:d")]
)
def test_names(name, wanted):
    assert safe_name(name) == wanted


def test_flat():
    assert flat({"a": 1, "b": {"c": True, "d": "text", "e": [1]}, "f": None}, "x/") == {
        "x/a": 1,
        "x/b/c": 1,
    }


def test_model(project, monkeypatch, capsys):
    architecture, file = Architecture(arch="resnet10", width=4), Path("model.safetensors")
    model = architecture.build(
        3, 1, torch.tensor([0.5]), torch.tensor([0.2]), rng=torch.Generator()
    )
    save_model(file, model, architecture, ("a", "b", "c"))
    store = project.store()
    rows = [store.create("row", {}, {}) for _ in range(2)]
    for row in rows:
        log_model(store, row, file, "backdoored", (1, 16, 16), backdoored=True, maker=rows[0])
    (logged,) = store.client.search_logged_models([store.experiment])
    assert logged.tags["rnp.backdoored"] == "true" and logged.source_run_id == rows[0]
    for row in rows:
        run = store.client.get_run(row)
        assert (
            run.data.tags["rnp.model.backdoored"]
            == run.outputs.model_outputs[0].model_id
            == logged.model_id
        )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
    again = mlflow.pytorch.load_model(f"models:/{logged.model_id}")
    images = torch.rand(5, 1, 16, 16, generator=torch.Generator())
    torch.testing.assert_close(again(images), load_model(file)[0](images))
    requirements = Path(
        mlflow.artifacts.download_artifacts(f"models:/{logged.model_id}"), "requirements.txt"
    ).read_text()
    assert f"torch=={torch.__version__.partition('+')[0]}" in requirements.splitlines()
    assert capsys.readouterr().err == ""


def test_model_that_cannot_be_exported(project, monkeypatch, capsys):
    file = Path("model.safetensors")
    file.write_bytes(b"no model")
    store = project.store()
    row = store.create("row", {}, {})
    log_model(store, row, file, "repaired", (1, 16, 16), backdoored=False, maker=row)
    assert store.uri and "model.safetensors is not logged" in capsys.readouterr().err
