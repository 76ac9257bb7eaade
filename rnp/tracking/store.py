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
from typing import TypeVar
from urllib.parse import urlparse
from urllib.request import url2pathname

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
BATCH = 1000  # metrics that an MLflow server takes in one call


def root() -> Path:
    """The project, also for a stage that DVC runs in a temporary copy of it."""
    return Path(os.environ.get("DVC_ROOT") or Path.cwd()).absolute()


def store_uri() -> str | None:
    """Where MLflow keeps the runs, None when tracking is off. The path of an sqlite file counts
    from `root`.
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
def locked(uri: str) -> Iterator[None]:
    """One process at a time beside the same sqlite file: two that migrate a fresh one together
    crash.
    """
    file = database(uri)
    if file is None:
        yield
        return
    import fcntl

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f"{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Store:
    """An MLflow experiment that fails open: the first failure is told once, from then on nothing
    is done.
    """

    def __init__(self, remedy: str = "the next `dvc repro` makes up for it") -> None:
        self.uri, self.remedy = store_uri(), remedy
        self.client = self.experiment = None
        if self.uri:
            self.guarded(self._open)
            self.guarded(self._close_dead_runs)

    def guarded(self, work: Callable[..., T], *arguments: object) -> T | None:
        """What `work` returns; None when tracking is off or `work` fails, which switches it off."""
        if self.uri is None:
            return None
        try:
            return work(*arguments)
        except Exception as error:  # whatever it is, the training goes on
            warn(
                f"MLflow at {self.uri} failed, going on without it; {self.remedy} ({short_error(error)})"
            )
            self.uri = None
            return None

    def _open(self) -> None:
        os.environ.update({key: value for key, value in PATIENCE.items() if key not in os.environ})
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        from mlflow import MlflowClient  # one to two seconds

        name, file = experiment_name(), database(self.uri)
        place = (file.parent / "mlruns").as_uri() if file else None
        with locked(self.uri):
            self.client = client = MlflowClient(self.uri)
            found = client.get_experiment_by_name(name) or client.get_experiment(
                client.create_experiment(name, place)
            )
        self.experiment, place = found.experiment_id, urlparse(found.artifact_location)
        if file and place.scheme == "file" and not Path(url2pathname(place.path)).parent.is_dir():
            raise FileNotFoundError(
                f"its files were in {place.path}, which is gone; after moving the project delete"
                f" {file}"
            )

    def search(self, condition: str) -> list:
        found, token = [], None
        while True:  # a server hands them out in pages
            page = self.client.search_runs([self.experiment], condition, page_token=token)
            found, token = [*found, *page], page.token
            if not token:
                return found

    def _close_dead_runs(self) -> None:
        """End the runs whose process died without a word: a stage run was killed, an unfinished
        row is none.
        """
        for run in self.search(
            f"attributes.status = 'RUNNING' and tags.`rnp.host` = '{socket.gethostname()}'"
        ):
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

        run_id = self.client.create_run(
            self.experiment, now() - int(seconds * 1000), tags, name
        ).info.run_id
        entries = [Param(safe_name(key), str(value)) for key, value in params.items()]
        for some in chunks(entries, 100):  # as many as a server takes
            self.client.log_batch(run_id, params=some)
        return run_id

    def log(self, run_id: str, metrics: list) -> None:
        for some in chunks(metrics, BATCH):
            self.client.log_batch(run_id, metrics=some)

    def log_report(self, run_id: str, report: Path, seconds: float) -> None:
        """End values and figures of a stage from its report folder."""
        self.log(
            run_id,
            [
                *to_metrics(flat(load(report / "metrics.json")), prefix="final/"),
                *to_metrics({"seconds": seconds}),
            ],
        )
        self.log_figures(run_id, report)

    def log_figures(self, run_id: str, report: Path, folder: str = "plots") -> None:
        for figure in sorted(report.glob("*.png")):
            self.client.log_artifact(run_id, str(figure), folder)

    def close(self, run_id: str, status: str = "FINISHED", error: str = "") -> None:
        if error:
            self.client.log_text(run_id, error, "error.txt")
        self.client.set_terminated(run_id, status)


def finished_rows() -> list[tuple[dict[str, str], dict[str, float], str]]:
    """Parameters, metrics and time (UTC) of the finished configurations; empty, after a warning,
    where MLflow fails.
    """
    store = Store()
    found = (
        store.guarded(
            store.search, "tags.`rnp.kind` = 'pipeline' and attributes.status = 'FINISHED'"
        )
        or []
    )

    def when(run):
        return f"{datetime.datetime.fromtimestamp(run.info.start_time / 1000, datetime.UTC):%Y-%m-%d %H:%M:%S}"

    return [(run.data.params, run.data.metrics, when(run)) for run in found]


def setup() -> None:
    """Create the store, or bring that of an older MLflow up to date."""
    Store()


def tags(kind: str, stage: str, key: str) -> dict[str, str]:
    """What a run says about its origin; the client, unlike MLflow's global functions, adds nothing
    by itself.
    """
    commit, version = git_commit(), None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version("rnp")
    found = {
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
    return {name: value for name, value in found.items() if value}


def git_commit() -> str:
    """The commit of this folder, with `-dirty` after it when tracked files differ; empty where
    there is no git.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=5,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def to_metrics(
    numbers: dict[str, float], step: int = 0, prefix: str = "", when: int | None = None
) -> list:
    from mlflow.entities import Metric

    when = now() if when is None else when
    return [
        Metric(safe_name(f"{prefix}{name}"), float(value), when, step)
        for name, value in numbers.items()
    ]


def flat(tree: dict, prefix: str = "") -> dict[str, float]:
    """The numbers and truth values of nested dictionaries, their names joined by slashes."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = float(value)
    return found


def chunks(entries: list, size: int) -> Iterator[list]:
    return (entries[start : start + size] for start in range(0, len(entries), size))


def load(path: Path) -> dict:
    """A JSON object, empty where there is no file; `rnp.io` would load PyTorch."""
    return json.loads(path.read_text()) if path.is_file() else {}


def safe_name(name: str) -> str:
    """`name` without the characters that MLflow refuses in names of parameters and metrics."""
    return re.sub(r"[^\w\-./ :]", "_", name, flags=re.ASCII)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def alive(pid: int) -> bool:
    """Whether another process has this id. Ours is new: what carries its number was written by one
    that is gone.
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
