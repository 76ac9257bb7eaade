"""Who runs the configurations of a sweep: processes of this machine, or Ray. Both start `dvc
repro` and try again once.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import psutil

from rnp.errors import UserError
from rnp.sweep.workspace import Configuration

REPRO = Path(__file__).with_name("repro_once.py")
ATTEMPTS = 2
GRACE = 10  # seconds between SIGTERM and SIGKILL, in which a stage closes its MLflow run
ENV_MARKER = (  # the variable by which a process is known as ours: the folder of its configuration
    "RNP_SWEEP"
)


@dataclass(frozen=True)
class Outcome:
    """How a configuration ended; `reason` is empty where it went well."""

    seconds: float
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with every configuration, and what is added to the environment for it."""

    locks: Path
    target: str
    env: dict[str, str]


Outcomes = Iterator[tuple[Configuration, Outcome]]


def run(job: Job, configuration: Configuration, stop: threading.Event | None = None) -> Outcome:
    """`dvc repro`, and once more when it fails or is killed: what had finished comes from the
    cache then.
    """
    start, folder = time.monotonic(), configuration.folder
    command = [sys.executable, "-P", str(REPRO), str(job.locks), *filter(None, [job.target])]
    env = os.environ | job.env | {ENV_MARKER: str(folder), "DVC_EXP_NAME": configuration.name}
    code = None
    with configuration.log.open("wb") as log:
        for _ in range(ATTEMPTS):
            if stop is not None and stop.is_set():
                break
            terminate_tree(folder)  # Ray starts a task anew when its worker is killed
            code = subprocess.Popen(
                command,
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ).wait()
            terminate_tree(folder)  # a stage outlives a DVC that is killed
            if code == 0:
                break
    seconds = round(time.monotonic() - start, 1)
    if code == 0:
        configuration.finish(seconds)
    return Outcome(seconds, "" if code == 0 else failure_reason(configuration.log, code))


def locally(job: Job, todo: list[Configuration], *, workers: int) -> Outcomes:
    """Each as it ends. A thread waits for each process, so that one that is killed takes no other
    along.
    """
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        running = {pool.submit(run, job, each, stop): each for each in todo}
        try:
            for done in as_completed(running):
                yield running[done], done.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(
                each.done() for each in running
            ):  # a thread may be about to start its process
                terminate_tree(job.locks.parent)
                time.sleep(0.1)


def by_ray(
    job: Job, todo: list[Configuration], *, workers: int, threads: int, gpus: float
) -> Outcomes:
    """The same on the cluster of RAY_ADDRESS, whose machines share the file system, or on one made
    here.

    Raises: UserError when Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--ray needs Ray; pip install -c constraints.txt -e '.[ray]'") from None
    size = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers * threads}
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", **size)
    try:
        task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=ATTEMPTS - 1)(run)
        running = {task.remote(job, each): each for each in todo}
        while running:
            (done,), _ = ray.wait(list(running))
            try:
                outcome = ray.get(done)
            except ray.exceptions.RayError as error:
                outcome = Outcome(0.0, f"Ray: {' '.join(str(error).split())[:200]}")
            yield running.pop(done), outcome
    finally:
        ray.shutdown()
        terminate_tree(job.locks.parent)


def terminate_tree(folder: Path) -> None:
    """End what still works in a folder or below it: a process that is killed leaves its children
    behind.
    """
    found = [process for process in psutil.process_iter() if belongs_to(process, folder)]
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(found, timeout=GRACE)[1]:
        with contextlib.suppress(psutil.Error):
            process.kill()
            process.wait(GRACE)


def belongs_to(process: psutil.Process, folder: Path) -> bool:
    try:
        place = process.environ().get(ENV_MARKER)
    except (psutil.Error, OSError):
        return False
    return place is not None and Path(place).is_relative_to(folder) and process.pid != os.getpid()


def failure_reason(log: Path, code: int | None) -> str:
    """What ended it: the signal, or the stage and the last line of the log that names an error,
    ours before DVC's.
    """
    if code is None or code < 0:
        return "ended before it began" if code is None else f"killed by signal {-code}"
    text = log.read_text(errors="replace")
    stage = re.findall(r"failed to reproduce '([^']+)'", text)[-1:]
    patterns = (
        r"^error: (.+)$",
        r"^((?:\w+\.)*\w+(?:Error|Exception|Interrupt)\b.*)$",
        r"^ERROR: (.+)$",
    )
    found = next(
        (lines for pattern in patterns if (lines := re.findall(pattern, text, re.MULTILINE))),
        [f"exit code {code}"],
    )
    return ": ".join([*stage, found[-1][:200]]) + f" ({log.name})"
