"""A measurement is a process of its own: it starts cold, and its peak of memory is its own."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rnp.training.openmp import VARIABLES

ROOT = Path(__file__).parent.parent
MINUTE = 60.0
Result = dict[str, object]
Runs = dict[str, list[Result] | Result]
"""By the name of a measurement its repeats, or `{"failed": why}`."""


class Failed(Exception):
    """A measurement ended without a result; one line that says why."""


def peak_memory() -> int:
    """Bytes of memory that this process has had at most: `ru_maxrss` would count what the process
    had that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        return (
            next(
                int(line.split()[1])
                for line in status.read_text().splitlines()
                if line.startswith("VmHWM")
            )
            * 1024
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def call(*command: str | Path, folder: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """What a command prints; its code is that of this checkout unless `env` says otherwise.

    Raises: Failed with the last line that it wrote.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)} if env is None else env
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=env, capture_output=True, text=True
    )
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
        raise Failed(f"exit code {done.returncode}: {lines[-1][:300]}")
    return done.stdout


def ended(folder: Path, stage: str) -> Path:
    """What a stage that runs in `folder` writes last."""
    return folder / "reports" / stage.replace("@", "/") / "run.json"


def measure(what: str, /, **arguments: object) -> Result:
    """The result of a function of `benchmarks.measure`."""
    return result(call(sys.executable, "-m", "benchmarks.measure", what, json.dumps(arguments)))


def measure_untouched(what: str, /, **arguments: object) -> Result:
    """As `measure`, but threads wait as libgomp has it by itself: PyTorch is loaded before
    anything of ours.
    """
    start = "import runpy, torch; runpy.run_module('benchmarks.measure', run_name='__main__')"
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return result(
        call(
            sys.executable,
            "-c",
            start,
            what,
            json.dumps(arguments),
            env=env | {"PYTHONPATH": str(ROOT)},
        )
    )


def result(said: str) -> Result:
    """What a measurement printed last."""
    return json.loads(said.splitlines()[-1])


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Another process takes all of one core while the block lasts."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def repeat(asked: dict[str, Callable[[], Result]], repeats: int) -> Runs:
    """All of `asked` in turn, and again; what takes over a minute is done once."""
    found: Runs = {name: [] for name in asked}
    for turn in range(repeats):
        for name, ask in asked.items():
            done = found[name]
            if isinstance(done, dict) or (turn and done[0]["process_seconds"] > MINUTE):
                continue
            start = time.monotonic()
            try:
                done.append(ask())
                done[-1]["process_seconds"] = round(time.monotonic() - start, 3)
                say(f"  {name}: {done[-1]['process_seconds']:.1f} s")
            except Failed as error:
                found[name] = {"failed": str(error)}
                say(f"  {name} FAILED: {error}")
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def median(runs: Runs, name: str, key: str) -> float | None:
    """The median of one number over the repeats of a measurement; None when it failed or was not
    made.
    """
    done = runs.get(name) or []
    values = (
        [] if isinstance(done, dict) else [each[key] for each in done if each.get(key) is not None]
    )
    return statistics.median(values) if values else None
