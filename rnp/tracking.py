"""MLflow: one run per stage, one row per configuration. Nothing in here may stop or fail a
stage.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
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
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BATCH = 1000  # metrics that an MLflow server takes in one call
LIVE_AFTER = 60.0  # seconds after which a stage shows up in MLflow while it works


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
            self.attempt(self._open)
            self.attempt(self._reap)

    def attempt(self, work: Callable[..., T], *arguments: object) -> T | None:
        """What `work` returns; None when tracking is off or `work` fails, which switches it off."""
        if self.uri is None:
            return None
        try:
            return work(*arguments)
        except Exception as error:  # whatever it is, the training goes on
            tell(
                f"MLflow at {self.uri} failed, going on without it; {self.remedy} ({brief(error)})"
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

    def _reap(self) -> None:
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
        entries = [Param(clean(key), str(value)) for key, value in params.items()]
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
                *points(flat(load(report / "metrics.json")), prefix="final/"),
                *points({"seconds": seconds}),
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


class StageRun:
    """The run of one stage, opened once the stage has lasted a while; `id` is None before, and
    where MLflow fails.

    Importing MLflow takes seconds, which short stages do not pay: `publish` makes their runs from
    the files they leave.
    """

    def __init__(self, stage: str, params: dict[str, object], attack: str) -> None:
        self.facts, self.start = (stage, params, attack), time.monotonic()
        self.store, self.id = None, None
        self.waiting: list[tuple[dict[str, float], int]] = []
        self.sent = self.start
        self._open_when_due()

    def _open_when_due(self) -> None:
        if self.store is None and time.monotonic() - self.start >= LIVE_AFTER:
            self._open()

    def _open(self) -> None:
        self.store = Store()
        self.id = self.store.attempt(self._create, *self.facts)

    def _create(self, stage: str, params: dict[str, object], attack: str) -> str:
        labels = tags("stage", stage, digest([stage, params]))
        return self.store.create(f"{stage}-{attack}", labels, params, time.monotonic() - self.start)

    def row(self, row: dict[str, float]) -> None:
        """Take one row of the history; rows travel together, every other second."""
        self.waiting.append((row, now()))
        if len(self.waiting) >= BATCH or time.monotonic() - self.sent > 2:
            self._open_when_due()
            self._send()

    def _send(self) -> None:
        if self.store is not None:
            waiting, self.waiting = self.waiting, []
            self.store.attempt(self._log, waiting)
        self.sent = time.monotonic()

    def _log(self, rows: list[tuple[dict[str, float], int]]) -> None:
        self.store.log(
            self.id,
            [point for row, when in rows for point in points(row, int(row["step"]), when=when)],
        )

    def results(self, report: Path, seconds: float) -> None:
        """Log what the stage left in its report folder."""
        self._open_when_due()
        self._send()
        if self.store is not None:
            self.store.attempt(self.store.log_report, self.id, report, seconds)

    def close(self, status: str, error: str) -> None:
        if self.store is None and status != "FINISHED":  # it leaves no files to make a run from
            self._open()
        self._send()
        if self.store is not None:
            self.store.attempt(self.store.close, self.id, status, error)


class Killed(SystemExit):
    """One of `SIGNALS`, with the exit code that a shell would report."""


@contextlib.contextmanager
def stage_run(stage: str, params: dict[str, object], attack: str) -> Iterator[StageRun]:
    """A run that ends as FINISHED, FAILED (exception, exit code) or KILLED (signal), as the block
    does.
    """

    def die(number: int, _: object) -> None:
        raise Killed(128 + number)

    handlers = {each: signal.getsignal(each) for each in SIGNALS}
    for each, handler in handlers.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(each, die)
    run, status, error = None, "FAILED", ""
    try:
        run = StageRun(stage, params, attack)
        yield run
        status = "FINISHED"
    except Killed:
        status = "KILLED"
        raise
    except BaseException as failure:
        status = "FINISHED" if isinstance(failure, SystemExit) and not failure.code else "FAILED"
        error = "" if status == "FINISHED" else traceback.format_exc()
        raise
    finally:
        for each in handlers:
            signal.signal(
                each, signal.SIG_IGN
            )  # a second Ctrl-C would leave the run open; closing takes seconds at most
        if run is not None:
            run.close(status, error)
        for each, handler in handlers.items():
            signal.signal(each, handler)


def finished_rows() -> list[tuple[dict[str, str], dict[str, float], str]]:
    """Parameters, metrics and time (UTC) of the finished configurations; empty, after a warning,
    where MLflow fails.
    """
    store = Store()
    found = (
        store.attempt(
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


def points(
    numbers: dict[str, float], step: int = 0, prefix: str = "", when: int | None = None
) -> list:
    from mlflow.entities import Metric

    when = now() if when is None else when
    return [
        Metric(clean(f"{prefix}{name}"), float(value), when, step)
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


def clean(name: str) -> str:
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


def brief(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def public(text: str) -> str:
    """`text` without the name and password that a URI may hold."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def tell(message: str) -> None:
    print("warning:", public(message), file=sys.stderr, flush=True)


def log_dataset(store: Store, run_id: str, name: str, md5: str, source: str) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = DatasetInput(
        Dataset(name, md5, "local", source), [InputTag("mlflow.data.context", "training")]
    )
    store.client.log_inputs(run_id, [data])


def log_model(
    store: Store,
    run_id: str,
    path: Path,
    name: str,
    shape: tuple[int, ...],
    *,
    backdoored: bool,
    maker: str,
) -> None:
    """Link the model in `path` to a run; the store keeps one copy of each file. `maker` is the run
    that made it.

    `shape` is that of an image. A network that PyTorch cannot export is left out, with a warning.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    from rnp.io import sha256

    labels = {"rnp.sha256": sha256(path), "rnp.backdoored": str(backdoored).lower()}
    same = store.client.search_logged_models(
        [store.experiment], f"tags.`rnp.sha256` = '{labels['rnp.sha256']}'"
    )
    model = next((each for each in same if each.status == LoggedModelStatus.READY), None)
    if model is None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                export(path, shape, Path(folder, name))
            except Exception as error:
                return tell(f"{path} is not logged, for PyTorch cannot export it ({brief(error)})")
            model = store.client.create_logged_model(store.experiment, name, maker, labels)
            store.client.log_model_artifacts(model.model_id, str(Path(folder, name)))
        store.client.finalize_logged_model(model.model_id, "READY")
    store.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
    store.client.set_tag(run_id, f"rnp.model.{name}", model.model_id)


def export(path: Path, shape: tuple[int, ...], folder: Path) -> None:
    """Write the model as MLflow reads it: a traced graph for inference that needs none of our
    code.
    """
    import mlflow.pytorch
    import numpy as np
    import torch

    from rnp.io import load_model

    model = load_model(path)[0].cpu().lay_out("the export warns of other strides")
    example = np.zeros((2, *shape), np.float32)  # a batch of one would be frozen into the graph
    torch_version = torch.__version__.partition("+")[0]
    mlflow.pytorch.save_model(
        model,
        str(folder),
        input_example=example,
        pip_requirements=[f"torch=={torch_version}"],
        serialization_format="pt2",
    )
