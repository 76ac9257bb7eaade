"""Run the configurations of a sweep, and report on each."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rnp.errors import UserError
from rnp.params.read import read_params
from rnp.sweep.grid import PARAMS, grid
from rnp.sweep.runners import Job, Outcome, Outcomes, by_ray, locally, terminate_tree
from rnp.sweep.workspace import Configuration, Snapshot
from rnp.tracking.stage_run import SIGNALS, Interrupted
from rnp.tracking.store import store_uri


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """What to run, and how.

    `root` is the checkout, `out` the folder of its copies, `target` the stage to run up to (empty:
    the whole pipeline), `table` a CSV file that takes a row of each configuration. With `ray` Ray
    places them, with `gpus` GPUs each.
    """

    root: Path
    out: Path
    overrides: tuple[str, ...]
    target: str = ""
    workers: int = 2
    threads: int = 1
    table: Path | None = None
    ray: bool = False
    gpus: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a configuration ended; `reason` says why it failed, or why the table has no row of it."""

    name: str
    state: str
    seconds: float
    reason: str

    def cells(self) -> tuple[str, str, str, str]:
        return self.name, self.state, f"{self.seconds:.0f}", self.reason


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The configurations of a grid, of which `finished` ended before and `todo` are to be run."""

    settings: SweepSettings
    configurations: list[Configuration]
    finished: list[Configuration]
    todo: list[Configuration]
    job: Job

    def run(self) -> Generator[Result, None, None]:
        """Run what is to be run; a result for each configuration as it ends.

        Closing the generator ends what is running.
        """
        before = [(each, Outcome(each.recall()["seconds"])) for each in self.finished]
        with contextlib.closing(self._start()) as outcomes:
            for configuration, outcome in itertools.chain(before, outcomes):
                yield self._result(configuration, outcome)
        shutil.rmtree(self.job.locks)

    def _start(self) -> Outcomes:
        settings = self.settings
        engine = locally
        if settings.ray:
            engine = functools.partial(by_ray, threads=settings.threads, gpus=settings.gpus)
        return engine(self.job, self.todo, workers=settings.workers)

    def _result(self, configuration: Configuration, outcome: Outcome) -> Result:
        reason = outcome.reason
        if not reason and self.settings.table:
            reason = put_row(self.settings.table, configuration, self.job.env)
        state = "finished before" if configuration in self.finished else "finished"
        return Result(
            name=configuration.name,
            state="failed" if outcome.reason else state,
            seconds=outcome.seconds,
            reason=reason,
        )


@contextlib.contextmanager
def open_sweep(settings: SweepSettings) -> Iterator[Sweep]:
    """A sweep with its copies of the checkout; no other process uses its folder meanwhile.

    Raises: UserError when there is no checkout, another sweep runs in the folder, or two
    configurations would be one row of the table.
    """
    if not (settings.root / ".dvc").is_dir():
        raise UserError(f"{settings.root} holds no .dvc folder; run `rnp sweep` where dvc.yaml is")
    texts = grid(settings.overrides, settings.root / PARAMS)
    with exclusive_folder(settings.out), interruptible():
        yield plan(settings, texts)


def plan(settings: SweepSettings, texts: dict[str, str]) -> Sweep:
    """Copy the checkout for each configuration that has not finished; `texts` are from `grid`."""
    snapshot = Snapshot.take(settings.root, without=settings.table)
    configurations = [
        Configuration(
            name=name,
            folder=settings.out / name,
            params=text,
            key=snapshot.key(text, settings.target),
        )
        for name, text in texts.items()
    ]
    finished = [each for each in configurations if each.finished]
    todo = [each for each in configurations if each not in finished]
    for configuration in todo:
        configuration.copy(snapshot)
    if settings.table:
        check_rows_differ(configurations)
    job = Job(
        locks=settings.out / ".locks",
        target=settings.target,
        env=run_environment(settings.root, settings.threads),
    )
    job.locks.mkdir(exist_ok=True)
    return Sweep(
        settings=settings, configurations=configurations, finished=finished, todo=todo, job=job
    )


@contextlib.contextmanager
def exclusive_folder(out: Path) -> Iterator[None]:
    """Let no other process use `out`, which git ignores.

    Raises: UserError when another sweep uses it.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / ".gitignore").write_text("*\n")
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `rnp sweep` is at work in {out}; wait for it, or name another --out"
            ) from None
        terminate_tree(out)  # what a sweep that was killed left running
        yield


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn a signal into an exception, so that the block can end what it started."""

    def interrupt(number: int, _: object) -> None:
        raise Interrupted(128 + number)

    handlers = {
        number: signal.signal(number, interrupt)
        for number in SIGNALS
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run_environment(root: Path, threads: int) -> dict[str, str]:
    """The variables by which a copy uses the data, the MLflow store and the Python of `root`."""
    env = {
        "DVC_ROOT": str(root),
        "RNP_DATA": str(root / os.environ.get("RNP_DATA", "data")),
        "OMP_NUM_THREADS": str(threads),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    uri = store_uri()
    return env | ({"MLFLOW_TRACKING_URI": uri} if uri else {})


def put_row(table: Path, configuration: Configuration, env: dict[str, str]) -> str:
    """Add its row to the table by `rnp collect`; the reason if that fails, else nothing."""
    process = subprocess.run(
        [sys.executable, "-m", "rnp", "collect", str(table)],
        cwd=configuration.folder,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    if process.returncode == 0:
        return ""
    lines = process.stderr.strip().splitlines() or ["?"]
    return f"no row: {lines[-1].removeprefix('error: ')}"


def check_rows_differ(configurations: list[Configuration]) -> None:
    """Raises: UserError when two of them would be the same row of a table."""
    names: dict[tuple, str] = {}
    for configuration in configurations:
        params = read_params(configuration.folder / PARAMS)
        key = (params.get("preset"), params["poison"]["attack"], params["seed"])
        if key in names:
            raise UserError(
                f"--table tells rows apart by preset, attack and seed, which {names[key]} and"
                f" {configuration.name} share; leave it out, and run `rnp collect` in the folders"
            )
        names[key] = configuration.name


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The lines of a table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
