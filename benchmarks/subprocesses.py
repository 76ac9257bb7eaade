"""Measurements in processes of their own: each starts cold, with its own peak of memory."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rnp.training.openmp import VARIABLES

ROOT = Path(__file__).parent.parent
MINUTE = 60.0
Result = dict[str, Any]
Runs = dict[str, list[Result] | Result]
"""By the name of a measurement its repeats, or `{"failed": why}`."""
STATUS = Path("/proc/self/status")


class Failed(Exception):
    """A measurement ended without a result; the message is one line with the reason."""


def peak_memory() -> int:
    """The most memory that this process has had, in bytes.

    On Linux `ru_maxrss` would include the memory of the process that started this one.
    """
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def call(*command: str | Path, folder: Path = ROOT, env: Mapping[str, str] | None = None) -> str:
    """The output of a command, whose code is that of this checkout unless `env` differs.

    Raises: Failed with the last line that it wrote.
    """
    env = {**os.environ, "PYTHONPATH": str(ROOT)} if env is None else env
    words = [str(word) for word in command]
    process = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    if process.returncode:
        output = process.stderr.strip() or process.stdout.strip()
        lines = output.splitlines() or ["no output"]
        raise Failed(f"exit code {process.returncode}: {lines[-1][:300]}")
    return process.stdout


def run_record(folder: Path, stage: str) -> Path:
    """The file that a stage writes last, when it runs in `folder`."""
    return folder / "reports" / stage.replace("@", "/") / "run.json"


def measure(name: str, /, **arguments: object) -> Result:
    """The result of a function of `benchmarks.measure`."""
    words = (name, json.dumps(arguments))
    return last_result(call(sys.executable, "-m", "benchmarks.measure", *words))


def measure_untouched(name: str, /, **arguments: object) -> Result:
    """As `measure`, but threads wait as libgomp does by itself: PyTorch is loaded first."""
    start = "import runpy, torch; runpy.run_module('benchmarks.measure', run_name='__main__')"
    env = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    env["PYTHONPATH"] = str(ROOT)
    words = (name, json.dumps(arguments))
    return last_result(call(sys.executable, "-c", start, *words, env=env))


def last_result(output: str) -> Result:
    """The JSON object on the last line of an output."""
    return json.loads(output.splitlines()[-1])


@contextlib.contextmanager
def busy_core() -> Iterator[None]:
    """Let another process use all of one core meanwhile."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def repeat(measurements: dict[str, Callable[[], Result]], repeats: int) -> Runs:
    """Make all measurements in turn, then again; one that takes over a minute is made once."""
    runs: Runs = {name: [] for name in measurements}
    for _ in range(repeats):
        for name, measurement in measurements.items():
            results = runs[name]
            if isinstance(results, dict) or (results and long(results[0])):
                continue
            start = time.monotonic()
            try:
                result = measurement()
            except Failed as error:
                runs[name] = {"failed": str(error)}
                say(f"  {name} FAILED: {error}")
                continue
            result["process_seconds"] = round(time.monotonic() - start, 3)
            results.append(result)
            say(f"  {name}: {result['process_seconds']:.1f} s")
    return runs


def long(result: Result) -> bool:
    """Whether a measurement is not worth repeating."""
    return result["process_seconds"] > MINUTE


def say(text: str) -> None:
    """Report progress on stderr."""
    print(text, file=sys.stderr, flush=True)


def median(runs: Runs, name: str, key: str) -> float | None:
    """The median of one number over the repeats of a measurement; None where there is none."""
    results = runs.get(name) or []
    if isinstance(results, dict):
        return None
    values = [result[key] for result in results if result.get(key) is not None]
    return statistics.median(values) if values else None
