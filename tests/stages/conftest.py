"""A project folder with the toy's parameters and an MLflow store, and ways to run stages in it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import toy
import yaml

import stages.publish
import stages.stage
from rnp.tracking.store import Store

ROOT = Path(__file__).parents[2]
CROWD = """
import sys

from rnp.tracking import stage_run as runs

runs.LIVE_AFTER = 0
with runs.stage_run(sys.argv[1], {}, "crowd") as run:
    for step in range(2000):
        run.row({"step": step, "loss": 0.5, "accuracy": 0.5})
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "DVC_", "RNP_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setattr(stages.stage, "check_params", lambda params: params)
    monkeypatch.setattr("rnp.tracking.stage_run.LIVE_AFTER", 0)


@pytest.fixture(scope="session")
def crowd(tmp_path_factory):
    """A store that two processes created at the same moment, each to write 4,000 points; their
    exit codes and words.
    """
    folder = tmp_path_factory.mktemp("crowd")
    env = {
        **os.environ,
        "DVC_ROOT": str(folder),
        "PYTHONPATH": str(ROOT),
        "MLFLOW_EXPERIMENT_NAME": "crowd",
    }
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", CROWD, f"writer{n}"], env=env, stderr=subprocess.PIPE, text=True
        )
        for n in range(2)
    ]
    words = [writer.communicate()[1] for writer in writers]
    return folder, [writer.returncode for writer in writers], words


class Project:
    """A folder with params.yaml, mlflow.db and reports; a blank in its name."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        self.write(toy.PARAMS)

    def write(self, params: dict) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params))

    def stage(self, name: str, do: str = "well", lr: float = 0.1) -> int:
        """Run a toy stage in this process; its exit code."""
        arguments = [
            "--lr",
            str(lr),
            "--do",
            do,
            "--out",
            f"{name}.txt",
            "--report",
            f"reports/{name}",
        ]
        with self.monkeypatch.context() as patch:
            patch.setenv("DVC_STAGE", name)
            patch.setattr(sys, "argv", [name, *arguments])
            patch.setattr(stages.stage.History, "listeners", [])
            try:
                stages.stage.main(toy.stage(name), name)
            except SystemExit as end:
                return int(end.code or 0)
        return 0

    def pipeline(self, **lr: float) -> None:
        for name in ("train", "recover"):
            assert self.stage(name, lr=lr.get(name, 0.1)) == 0
        stages.publish.publish()

    def run_json(self, stage: str) -> dict:
        return json.loads((self.folder / f"reports/{stage}/run.json").read_text())

    def store(self) -> Store:
        store = Store()
        assert store.uri, "the store does not open"
        return store

    def runs(self, kind: str = "stage") -> list:
        """The runs of this kind, oldest first."""
        store = self.store()
        runs = store.search(f"tags.`rnp.kind` = '{kind}'")
        return sorted(runs, key=lambda run: run.info.start_time)

    def rows(self) -> list:
        return self.runs("pipeline")


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A project without a store."""
    folder = tmp_path / "a project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Project(folder, monkeypatch)


@pytest.fixture
def project(bare, crowd):
    """A project whose store has its tables, which take seconds to make, and no experiment of
    ours.
    """
    shutil.copy(crowd[0] / "mlflow.db", bare.folder)
    return bare
