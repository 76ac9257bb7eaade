"""The MLflow store. Nothing in here may stop or fail a stage."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlparse
from urllib.request import url2pathname

from rnp.io.files import read_json
from rnp.params.read import flatten

if TYPE_CHECKING:  # importing MLflow takes one to two seconds
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

T = TypeVar("T")
SQLITE = "sqlite:///"
PATIENCE = {  # MLflow's own defaults wait 4 to 20 minutes for a dead server; these wait 6 seconds
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "3",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
    "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT": "60",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
EXPERIMENT_KIND = "mlflow.experimentKind"
MODEL_TRAINING = "custom_model_development"
"""The kind of experiment that MLflow opens in its model-training view, not in that for GenAI."""
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000
"""As many as an MLflow server accepts."""


def root() -> Path:
    """The project, also for a stage that DVC runs in a temporary copy of it."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).absolute()


def store_uri() -> str | None:
    """Where MLflow keeps the runs, None when tracking is off.

    The path of an sqlite file is relative to `root`.
    """
    if os.environ.get("RNP_TRACKING", "").lower() in ("off", "false", "no", "0"):
        return None
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}mlflow.db"
    return f"{SQLITE}{root() / uri.removeprefix(SQLITE)}" if uri.startswith(SQLITE) else uri


def experiment_name() -> str:
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "rnp"


def database(uri: str) -> Path | None:
    """The file of an sqlite store, None for a server."""
    return Path(uri.removeprefix(SQLITE).partition("?")[0]) if uri.startswith(SQLITE) else None


@contextlib.contextmanager
def locked(file: Path | None) -> Iterator[None]:
    """Let one process at a time open an sqlite store: two that migrate a new one together crash."""
    if file is None:
        yield
        return
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Store:
    """An MLflow experiment that fails open: after the first failure, which is a warning, every
    call does nothing.
    """

    client: MlflowClient
    experiment: str

    def __init__(self, remedy: str = "the next `dvc repro` makes up for it") -> None:
        self.uri = store_uri()
        self.remedy = remedy
        if self.uri:
            self.guarded(self._open, self.uri)
            self.guarded(self._close_dead_runs)

    def guarded(self, work: Callable[..., T], *arguments: object) -> T | None:
        """The result of `work`; None when tracking is off or `work` fails: then tracking ends."""
        if self.uri is None:
            return None
        try:
            return work(*arguments)
        except Exception as error:  # whatever it is, the training goes on
            failure = f"MLflow at {self.uri} failed, going on without it"
            warn(f"{failure}; {self.remedy} ({short_error(error)})")
            self.uri = None
            return None

    def _open(self, uri: str) -> None:
        os.environ.update({key: value for key, value in PATIENCE.items() if key not in os.environ})
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        from mlflow import MlflowClient

        file = database(uri)
        with locked(file):
            self.client = MlflowClient(uri)
            self.experiment, place = self._find_or_create_experiment(file)
        artifacts = urlparse(place)
        if not file or artifacts.scheme != "file":
            return
        if not Path(url2pathname(artifacts.path)).parent.is_dir():
            raise FileNotFoundError(
                f"its files were in {artifacts.path}, which does not exist any more;"
                f" after moving the project delete {file}"
            )

    def _find_or_create_experiment(self, file: Path | None) -> tuple[str, str]:
        """Its id, and where its artifacts are."""
        name = experiment_name()
        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            place = (file.parent / "mlruns").as_uri() if file else None
            created = self.client.create_experiment(name, place, {EXPERIMENT_KIND: MODEL_TRAINING})
            experiment = self.client.get_experiment(created)
        elif EXPERIMENT_KIND not in experiment.tags:
            self.client.set_experiment_tag(
                experiment.experiment_id, EXPERIMENT_KIND, MODEL_TRAINING
            )
        return experiment.experiment_id, experiment.artifact_location

    def search(self, condition: str) -> list[Run]:
        """All runs of the experiment that meet the condition."""
        runs: list[Run] = []
        token = None
        while True:  # a server returns them in pages
            page = self.client.search_runs([self.experiment], condition, page_token=token)
            runs += page
            token = page.token
            if not token:
                return runs

    def _close_dead_runs(self) -> None:
        """End the runs of processes that were killed: stage runs are marked, unfinished rows are
        deleted.
        """
        host = socket.gethostname()
        for run in self.search(f"attributes.status = 'RUNNING' and tags.`rnp.host` = '{host}'"):
            if alive(int(run.data.tags["rnp.pid"])):
                continue
            if run.data.tags["rnp.kind"] == "pipeline":
                self.client.delete_run(run.info.run_id)
            else:
                self.client.set_terminated(run.info.run_id, "KILLED")

    def create(
        self, name: str, tags: dict[str, str], params: dict[str, object], seconds: float = 0
    ) -> str:
        """The id of a new run that started `seconds` ago."""
        from mlflow.entities import Param

        start = now() - int(seconds * 1000)
        run_id = self.client.create_run(self.experiment, start, tags, name).info.run_id
        entries = [Param(safe_name(key), str(value)) for key, value in params.items()]
        for batch in chunks(entries, PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=batch)
        return run_id

    def log(self, run_id: str, metrics: list[Metric]) -> None:
        for batch in chunks(metrics, METRICS_PER_CALL):
            self.client.log_batch(run_id, metrics=batch)

    def log_report(self, run_id: str, report: Path, costs: dict[str, float]) -> None:
        """End values and figures of a stage from its report folder, and what the stage cost."""
        final = flat(read_json(report / "metrics.json", default={}))
        self.log(run_id, to_metrics(final, prefix="final/") + to_metrics(costs))
        self.log_figures(run_id, report)

    def log_figures(self, run_id: str, report: Path, folder: str = "plots") -> None:
        for figure in sorted(report.glob("*.png")):
            self.client.log_artifact(run_id, str(figure), folder)

    def close(self, run_id: str, status: str = "FINISHED", error: str = "") -> None:
        if error:
            self.client.log_text(run_id, error, "error.txt")
        self.client.set_terminated(run_id, status)


def finished_rows() -> list[tuple[dict[str, str], dict[str, float], str]]:
    """Parameters, metrics and time (UTC) of the finished configurations.

    Where MLflow fails there are none, after a warning.
    """
    store = Store()
    condition = "tags.`rnp.kind` = 'pipeline' and attributes.status = 'FINISHED'"
    runs = store.guarded(store.search, condition) or []
    return [(run.data.params, run.data.metrics, started(run)) for run in runs]


def started(run: Run) -> str:
    """When a run started, in UTC."""
    start = datetime.datetime.fromtimestamp(run.info.start_time / 1000, datetime.UTC)
    return f"{start:%Y-%m-%d %H:%M:%S}"


def setup() -> None:
    """Create the store, or bring that of an older MLflow up to date."""
    Store()


def tags(kind: str, stage: str, key: str) -> dict[str, str]:
    """Where a run comes from: MLflow's client, unlike its global functions, adds no tag itself."""
    commit = git_commit()
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("rnp")
    values = {
        "rnp.kind": kind,
        "rnp.stage": stage,
        "rnp.key": key,
        "rnp.version": version,
        "rnp.git": commit,
        "rnp.host": socket.gethostname(),
        "rnp.pid": str(os.getpid()),
        "dvc.stage": os.environ.get("DVC_STAGE"),
        "dvc.exp_name": os.environ.get("DVC_EXP_NAME"),
        "dvc.baseline_rev": os.environ.get("DVC_EXP_BASELINE_REV"),
        "mlflow.user": os.environ.get("USER") or f"uid {os.getuid()}",
        "mlflow.source.name": f"stages.{stage.partition('/')[0]}",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": commit.removesuffix("-dirty"),
    }
    return {name: value for name, value in values.items() if value}


def git_commit() -> str:
    """The commit of this folder, empty where there is no git.

    `-dirty` follows it when tracked files differ.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()


def to_metrics(
    numbers: dict[str, float], step: int = 0, prefix: str = "", when: int | None = None
) -> list[Metric]:
    from mlflow.entities import Metric

    when = now() if when is None else when
    return [
        Metric(safe_name(f"{prefix}{name}"), float(value), when, step)
        for name, value in numbers.items()
    ]


def flat(tree: dict, prefix: str = "") -> dict[str, float]:
    """The numbers and truth values of nested dictionaries, their names joined by slashes."""
    return {
        name: float(value)
        for name, value in flatten(tree, prefix, separator="/")
        if isinstance(value, (int, float))
    }


def chunks(entries: list[T], size: int) -> Iterator[list[T]]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def safe_name(name: str) -> str:
    """`name` without the characters that MLflow refuses in names of parameters and metrics."""
    return re.sub(r"[^\w\-./ :]", "_", name, flags=re.ASCII)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def alive(pid: int) -> bool:
    """Whether another process has this id.

    Our own id does not count: a run that carries it belongs to an earlier process of that id.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def now() -> int:
    return int(time.time() * 1000)


def short_error(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def hide_credentials(text: str) -> str:
    """`text` without the name and password that a URI may hold."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def warn(message: str) -> None:
    print("warning:", hide_credentials(message), file=sys.stderr, flush=True)
