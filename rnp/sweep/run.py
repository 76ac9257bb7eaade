"""Run the configurations of a sweep and report on each."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rnp.errors import UserError
from rnp.params.read import read_params
from rnp.sweep.grid import PARAMS
from rnp.sweep.runners import terminate_tree
from rnp.sweep.workspace import Configuration
from rnp.tracking.stage_run import SIGNALS, Interrupted
from rnp.tracking.store import store_uri


@contextlib.contextmanager
def exclusive_folder(out: Path) -> Iterator[None]:
    """`out`, with nobody else in it, and out of git's sight.

    Raises: UserError when another sweep holds it.
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
    """A signal leaves the block as an exception, so that what was started is ended."""

    def die(number: int, _: object) -> None:
        raise Interrupted(128 + number)

    handlers = {
        each: signal.signal(each, die)
        for each in SIGNALS
        if signal.getsignal(each) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


def run_environment(root: Path, threads: int) -> dict[str, str]:
    """The variables by which a copy finds data, MLflow and Python where the checkout does."""
    env = {
        "DVC_ROOT": str(root),
        "RNP_DATA": str(root / os.environ.get("RNP_DATA", "data")),
        "OMP_NUM_THREADS": str(threads),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    uri = store_uri()
    return env | ({"MLFLOW_TRACKING_URI": uri} if uri else {})


def put_row(table: Path, configuration: Configuration, env: dict[str, str]) -> str:
    """Put its row into the table by `rnp rows`, in the environment of the run; why that failed, if
    it did.
    """
    done = subprocess.run(
        [sys.executable, "-m", "rnp", "rows", str(table)],
        cwd=configuration.folder,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    return (
        ""
        if done.returncode == 0
        else f"no row: {(done.stderr.strip().splitlines() or ['?'])[-1].removeprefix('error: ')}"
    )


def check_rows_differ(configurations: list[Configuration]) -> None:
    """Raises: UserError when two of them would be the same row of a table."""
    seen = {}
    for each in configurations:
        params = read_params(each.folder / PARAMS)
        key = (params.get("preset"), params["poison"]["attack"], params["seed"])
        if key in seen:
            raise UserError(
                f"--table tells rows apart by preset, attack and seed, which {seen[key]} and"
                f" {each.name} share; leave it out, and run `rnp rows` in the folders"
            )
        seen[key] = each.name


def lines(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """A table in columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
