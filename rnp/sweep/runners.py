"""The two ways to run the configurations of a sweep: processes of this machine, or Ray.

Both start `dvc repro`, and try once more when it fails.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from rnp.errors import UserError
from rnp.sweep.workspace import Configuration

REPRO = Path(__file__).with_name("repro_once.py")
ATTEMPTS = 2
GRACE = 10  # seconds between SIGTERM and SIGKILL, in which a stage closes its MLflow run
ENV_MARKER = "RNP_SWEEP"
"""The variable that marks our processes; it holds the folder of their configuration."""
ERROR_LINES = (
    r"^error: (.+)$",
    r"^((?:\w+\.)*\w+(?:Error|Exception|Interrupt)\b.*)$",
    r"^ERROR: (.+)$",
)
"""Lines of a log that name an error: those of `rnp`, of Python, of DVC."""


@dataclass(frozen=True)
class Outcome:
    """How a configuration ended; `reason` is empty where it succeeded."""

    seconds: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with every configuration; `env` is added to its environment."""

    locks: Path
    target: str
    env: dict[str, str]


Outcomes = Generator[tuple[Configuration, Outcome], None, None]


def run(job: Job, configuration: Configuration, stop: threading.Event | None = None) -> Outcome:
    """`dvc repro`, and once more when it fails or is killed: what had finished is in the cache."""
    start = time.monotonic()
    folder = configuration.folder
    code = None
    with configuration.log.open("wb") as log:
        for _ in range(ATTEMPTS):
            if stop is not None and stop.is_set():
                break
            terminate_tree(folder)  # Ray starts a task anew when its worker is killed
            code = start_repro(job, configuration, log).wait()
            terminate_tree(folder)  # a stage outlives a DVC that is killed
            if code == 0:
                break
    seconds = round(time.monotonic() - start, 1)
    if code == 0:
        configuration.finish(seconds)
        return Outcome(seconds)
    return Outcome(seconds, failure_reason(configuration.log, code))


def start_repro(job: Job, configuration: Configuration, log: BinaryIO) -> subprocess.Popen[bytes]:
    folder = configuration.folder
    marks = {ENV_MARKER: str(folder), "DVC_EXP_NAME": configuration.name}
    return subprocess.Popen(
        [sys.executable, "-P", str(REPRO), str(job.locks), *filter(None, [job.target])],
        cwd=folder,
        env=os.environ | job.env | marks,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def locally(job: Job, todo: Sequence[Configuration], *, workers: int) -> Outcomes:
    """Each configuration as it ends.

    A thread waits for each process, so that a process that is killed stops no other.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(run, job, each, stop): each for each in todo}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            # A thread may be about to start its process.
            while not all(future.done() for future in running):
                terminate_tree(job.locks.parent)
                time.sleep(0.1)


def by_ray(
    job: Job, todo: Sequence[Configuration], *, workers: int, threads: int, gpus: float
) -> Outcomes:
    """The same on the cluster of RAY_ADDRESS, whose machines share the file system.

    Without that variable Ray starts on this machine.

    Raises: UserError when Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        raise UserError("--ray needs Ray; pip install -c constraints.txt -e '.[ray]'") from None
    size = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers * threads}
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **size)
    try:
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=ATTEMPTS - 1)(run)
        running = {task.remote(job, each): each for each in todo}
        while running:
            (finished,), _ = ray.wait(list(running))
            try:
                outcome = ray.get(finished)
            except ray.exceptions.RayError as error:
                outcome = Outcome(0.0, f"Ray: {' '.join(str(error).split())[:200]}")
            yield running.pop(finished), outcome
    finally:
        ray.shutdown()
        terminate_tree(job.locks.parent)


def terminate_tree(folder: Path) -> None:
    """End all processes of configurations in a folder or below it.

    A process that is killed leaves its children running.
    """
    processes = [process for process in psutil.process_iter() if belongs_to(process, folder)]
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=GRACE)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
            process.wait(GRACE)


def belongs_to(process: psutil.Process, folder: Path) -> bool:
    """Whether another process than this one runs a configuration in or below `folder`."""
    try:
        place = process.environ().get(ENV_MARKER)
    except (psutil.Error, OSError):
        return False
    return place is not None and Path(place).is_relative_to(folder) and process.pid != os.getpid()


def failure_reason(log: Path, code: int | None) -> str:
    """Why a run ended: the signal, or the stage and the last line of the log that names an error.

    Errors of ours come before those of DVC.
    """
    if code is None:
        return "ended before it began"
    if code < 0:
        return f"killed by signal {-code}"
    text = log.read_text(errors="replace")
    stage = re.findall(r"failed to reproduce '([^']+)'", text)[-1:]
    matches = (re.findall(pattern, text, re.MULTILINE) for pattern in ERROR_LINES)
    errors = next((lines for lines in matches if lines), [f"exit code {code}"])
    return ": ".join([*stage, errors[-1][:200]]) + f" ({log.name})"
