"""The benchmark: `make bench` or `rnp bench` runs its parts, keeps their raw numbers in a JSON file
and writes tables of them.

A part that is run again replaces its older numbers; the others stay, each with its own machine,
versions and date. A failure is kept too. On a GPU a part has a name of its own (`train_cuda`), so
that it does not replace the numbers of the CPU.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.pipeline import read_pipeline, stages
from benchmarks.report import headline, markdown
from benchmarks.scaling import draw, exponents
from benchmarks.subprocesses import (
    ROOT,
    Failed,
    Result,
    Runs,
    busy_core,
    call,
    measure,
    measure_untouched,
    repeat,
    run_record,
    say,
)
from rnp.errors import UserError
from rnp.io.files import read_json, write_json, write_text
from rnp.params.presets import render
from rnp.params.read import read_params
from rnp.registry import names, suggest
from rnp.reporting.page import versions
from rnp.reporting.provenance import device_name
from rnp.tracking.store import git_commit
from rnp.training.device import default_device, half_precision

SIZES = {
    "cpu": {"width": 32, "batch": 256, "steps": 20, "warm_up": 3},
    "cuda": {"width": 64, "batch": 512, "steps": 2000, "warm_up": 10},
}
"""Of the part `train`: those of the presets cifar10-fast and cifar10."""
FEWER = {"cpu": {}, "cuda": {"steps": 200}}
"""For what is slower, or the same after some steps."""
IMAGES = 500
"""Clean images, and as many triggered ones, for the detectors of samples."""
BASE = {"images": 250, "width": 16, "max_fraction": 0.02, "side": 32}
AXES = {
    "images": (100, 250, 500, 1000),
    "width": (16, 32, 64),
    "max_fraction": (0.02, 0.04, 0.08, 0.16),
    "side": (32, 48, 64),
}
SUBJECT = ("prepare", "benign", "poison", "train", "unlearn")
"""The stages that make a model to defend."""
NEEDED = (
    "params.yaml",
    "models/backdoored.safetensors",
    "data/defense",
    "data/test",
    "data/triggered/test",
)
"""What the folder of a finished run must hold."""
START = """
import time
from rnp.cli.prune import prune
from stages.stage import main
prune.callback = lambda **_: print(time.clock_gettime(time.CLOCK_MONOTONIC))
main(prune, "prune")
"""
SHIM = """#!{python} -IS
import json, os, sys, time
start = time.monotonic()
pid = os.spawnv(os.P_NOWAIT, {python!r}, [{python!r}, *sys.argv[1:]])
_, status, usage = os.wait4(pid, 0)
if "DVC_STAGE" in os.environ:
    record = {{
        "stage": os.environ["DVC_STAGE"],
        "seconds": time.monotonic() - start,
        "peak": usage.ru_maxrss * 1024,
    }}
    with open({log!r}, "a") as file:
        print(json.dumps(record), file=file)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A `python` that also writes the seconds and the memory of each stage to a log."""


class BenchFixtures:
    """Folders that several parts need, each made when it is first used."""

    def __init__(self, folder: Path, run: Path | None, repeats: int, quick: bool) -> None:
        self.folder = folder
        self.run = run
        self.repeats = repeats
        self.quick = quick

    def new(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    @functools.cached_property
    def subject(self) -> Path:
        """The run to work on; without one the preset demo, up to its unlearned model."""
        if self.run:
            return self.run
        folder = self.new("subject")
        say("  a model to defend: the stages of demo")
        write_text(folder / "params.yaml", render("demo"))
        commands = stages(read_pipeline(), read_params(folder / "params.yaml"))
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RNP_TRACKING": "off"}
        for stage in SUBJECT:
            call(*commands[stage].arguments(), folder=folder, env=env | {"DVC_STAGE": stage})
        return folder

    @functools.cached_property
    def finished(self) -> tuple[Path, Result]:
        """A new clone of this checkout in which the pipeline of demo has run, and its times."""
        base = self.new("demo")
        clone = base / "clone"
        log = base / "stages.jsonl"
        python = base / "bin/python"
        call("git", "clone", "-q", ROOT, clone)
        write_text(clone / "params.yaml", render("demo"))
        env = user_environment()
        start = time.monotonic()
        call(sys.executable, "-m", "rnp", "setup", folder=clone, env=env)
        setup = time.monotonic() - start
        write_text(python, SHIM.format(python=sys.executable, log=str(log)))
        python.chmod(0o755)
        path = f"{python.parent}:{env['PATH']}"
        start = time.monotonic()
        call(sys.executable, "-m", "dvc", "repro", "-q", folder=clone, env=env | {"PATH": path})
        seconds = time.monotonic() - start
        records = [json.loads(line) for line in log.read_text().splitlines()]
        for record in records:
            report = run_record(clone, record["stage"])
            record["work"] = read_json(report)["seconds"] if report.exists() else None
        return clone, {"seconds": seconds, "setup_seconds": setup, "stages": records}


def user_environment() -> dict[str, str]:
    """That of a user who has just activated the environment: code and store are the folder's."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DVC_", "MLFLOW_")) and name != "PYTHONPATH"
    }
    return env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def train(fixtures: BenchFixtures) -> Runs:
    device = default_device().type
    size = SIZES.get(device, SIZES["cpu"])
    fewer = size | FEWER.get(device, {})
    workers = 2 if device == "cpu" else os.cpu_count()
    return repeat(
        {
            "plain": lambda: measure("train_plain", **fewer, workers=workers) | fewer,
            "ours": lambda: measure("train_ours", **size, precision="auto") | size,
            "ours, fp32": lambda: measure("train_ours", **fewer, precision="fp32") | fewer,
        },
        fixtures.repeats,
    )


def waiting(fixtures: BenchFixtures) -> Runs:
    """Two ways for threads to wait, on a quiet machine and beside a process that uses a core."""
    size = {"steps": 100, "limit": 30.0}

    def beside(ask: Callable[..., Result]) -> Result:
        with busy_core():
            return ask("training_steps", **size)

    return repeat(
        {
            "ours, alone": lambda: measure("training_steps", **size),
            "untouched, alone": lambda: measure_untouched("training_steps", **size),
            "ours, beside a busy process": lambda: beside(measure),
            "untouched, beside a busy process": lambda: beside(measure_untouched),
        },
        fixtures.repeats,
    )


def rnp(fixtures: BenchFixtures) -> Runs:
    folder = str(fixtures.subject)
    run_ours = functools.partial(measure, "rnp_ours", folder=folder)
    ours = repeat(
        {
            "ours": run_ours,
            "ours, fp32": lambda: run_ours(precision="fp32"),
            "ours, to collapse": lambda: run_ours(until_collapse=True),
            "ours, rebuilt": lambda: run_ours(rebuilt=True),
            "ours, rebuilt, fp32": lambda: run_ours(rebuilt=True, precision="fp32"),
        },
        fixtures.repeats,
    )
    results = ours["ours"]
    if isinstance(results, dict):
        failed: Runs = {"published": {"failed": "ours failed, whose number of steps it takes"}}
        return ours | failed
    steps = {name: results[0][name] for name in ("unlearn_steps", "recover_steps")}
    published = functools.partial(
        measure, "rnp_published", folder=folder, quick=fixtures.quick, **steps
    )
    return ours | repeat({"published": published}, fixtures.repeats)


def defenses(fixtures: BenchFixtures) -> Runs:
    folder = str(fixtures.subject)
    order = ("rnp", *(name for name in names("defense") if name != "rnp"))
    measurements = {
        name: functools.partial(measure, "defense", folder=folder, name=name) for name in order
    }
    return repeat(measurements, fixtures.repeats)


def detectors(fixtures: BenchFixtures) -> Runs:
    folder = str(fixtures.subject)
    measurements = {
        f"{family}/{name}": functools.partial(
            measure, "detector", folder=folder, family=family, name=name, images=IMAGES
        )
        for family in ("triggers", "labels", "samples")
        for name in names(family)
    }
    rnp = functools.partial(measure, "defense", folder=folder, name="rnp")
    return repeat({"rnp": rnp, **measurements}, fixtures.repeats)


def poison(fixtures: BenchFixtures) -> Runs:
    measurements = {
        name: functools.partial(measure, "poison", name=name) for name in names("attack")
    }
    return repeat(measurements, fixtures.repeats)


def start(fixtures: BenchFixtures) -> Runs:
    """From the start of the process to the call of the stage's function.

    That is imports, options, and the check of params.yaml.
    """
    folder = fixtures.new("start")
    write_text(folder / "params.yaml", render("demo"))
    options = ("model", "masks", "defense", "out", "report")
    arguments = [word for name in options for word in (f"--{name}", ".")]

    def stage(tracking: str) -> Result:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RNP_TRACKING": tracking}
        begun = time.clock_gettime(time.CLOCK_MONOTONIC)
        output = call(sys.executable, "-c", START, *arguments, folder=folder, env=env)
        return {
            "seconds": float(output.split()[-1]) - begun,
            "whole_seconds": time.clock_gettime(time.CLOCK_MONOTONIC) - begun,
        }

    def import_torch() -> Result:
        begun = time.monotonic()
        call(sys.executable, "-c", "import torch")
        return {"seconds": time.monotonic() - begun}

    stage("off")  # the first one reads the files from the disk
    return repeat(
        {
            "stage, tracking on": lambda: stage("on"),
            "stage, tracking off": lambda: stage("off"),
            "import torch": import_torch,
        },
        fixtures.repeats,
    )


def demo(fixtures: BenchFixtures) -> Runs:
    return repeat({"pipeline": lambda: fixtures.finished[1]}, 1)


def noop(fixtures: BenchFixtures) -> Runs:
    clone, _ = fixtures.finished

    def again() -> Result:
        begun = time.monotonic()
        output = call(sys.executable, "-m", "dvc", "repro", folder=clone, env=user_environment())
        if "Running stage 'prepare'" in output or "Running stage 'prune'" in output:
            raise Failed("it was no no-op: stages ran again")
        return {"seconds": time.monotonic() - begun}

    return repeat({"repro": again}, fixtures.repeats)


def scaling(fixtures: BenchFixtures) -> Runs:
    """One size at a time grows from `BASE`; the names of the runs are axis/value/phase."""
    runs: Runs = {}
    measured: dict[tuple, Runs] = {}
    for axis, value in ((axis, value) for axis, values in AXES.items() for value in values):
        point = BASE | {axis: value}
        folder = fixtures.folder / f"scale_{point['width']}_{point['side']}"
        if not folder.exists():
            runs |= scale_subject(folder, point["width"], point["side"])
        say(f"  {axis} {value}")
        key = tuple(point.values())
        if key not in measured:  # the base is a point of each axis
            measured[key] = scale_phases(folder, point, fixtures.repeats)
        runs |= {f"{axis}/{value}/{phase}": results for phase, results in measured[key].items()}
    return runs


def scale_subject(folder: Path, width: int, side: int) -> Runs:
    """Train the model that the three phases work on."""
    folder.mkdir()
    size = {"width": width, "side": side}
    train = functools.partial(measure, "scale_subject", folder=str(folder), **size)
    return repeat({f"subject/{width}x{side}": train}, 1)


def scale_phases(folder: Path, point: dict, repeats: int) -> Runs:
    """Unlearn, recover and prune at one point."""
    common = {"folder": str(folder), "images": point["images"]}
    prune = common | {"max_fraction": point["max_fraction"]}
    return repeat(
        {
            "unlearn": lambda: measure("scale_unlearn", **common),
            "recover": lambda: measure("scale_recover", **common),
            "prune": lambda: measure("scale_prune", **prune),
        },
        repeats,
    )


PARTS: dict[str, Callable[[BenchFixtures], Runs]] = {
    part.__name__: part
    for part in (start, train, waiting, poison, rnp, defenses, detectors, demo, noop, scaling)
}


def origin(run: Path | None, quick: bool) -> dict[str, object]:
    """Where the numbers of a part come from."""
    device = default_device()
    preset = read_params(run / "params.yaml").get("preset", "unnamed") if run else "demo"
    return {
        "made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        "commit": git_commit(),
        "device": device.type,
        "machine": hardware(),
        "versions": dict(versions()),
        "threads": torch.get_num_threads(),
        "subject": preset,
        "quick": quick,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def hardware() -> dict[str, object]:
    memory = 0
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "name": device_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "bf16": half_precision("auto", default_device()),
    }


def merge(old: dict, name: str, part: dict) -> dict:
    """The record with a part in place of its older numbers, and the head lines of all parts."""
    key = name if part["device"] == "cpu" else f"{name}_{part['device']}"
    parts = {**old.get("parts", {}), key: part}
    machine = {name: part[name] for name in ("machine", "versions", "threads")}
    return {**machine, "parts": parts, **headline(parts)}


def failures(record: dict, parts: list[str]) -> list[str]:
    """The names of the failures among the parts just run."""
    failed = []
    for name, part in record["parts"].items():
        if name.partition("_")[0] not in parts:
            continue
        if "failed" in part:
            failed.append(name)
        else:
            runs = part["runs"].items()
            failed += [f"{name}/{run}" for run, results in runs if isinstance(results, dict)]
    return failed


def run(
    only: tuple[str, ...],
    *,
    repeats: int,
    subject: Path | None,
    quick: bool,
    raw: Path,
    page: Path,
    plot: Path,
) -> list[str]:
    """Run the named parts, or all, and write the files after each; the names of the failures.

    Raises: UserError when there is no such part, or no such run.
    """
    check_arguments(only, repeats)
    subject = check_subject(subject) if subject else None
    record = read_json(raw, default={})
    chosen = [part for part in PARTS if part in only] or list(PARTS)
    with tempfile.TemporaryDirectory(prefix="rnp-bench-") as folder:
        fixtures = BenchFixtures(Path(folder), subject, repeats, quick)
        for name in chosen:
            say(name)
            part = run_part(name, fixtures)
            if "exponents" in part:
                draw(plot, part)
            record = merge(record, name, part)
            write_json(raw, record)
            write_text(page, markdown(record, picture=os.path.relpath(plot, page.parent)))
    return failures(record, chosen)


def run_part(name: str, fixtures: BenchFixtures) -> dict:
    """The runs of a part, or why it failed, with their origin."""
    part = origin(fixtures.run, fixtures.quick)
    try:
        runs = PARTS[name](fixtures)
    except Failed as error:
        say(f"  FAILED: {error}")
        return part | {"failed": str(error)}
    return part | {"runs": runs} | ({"exponents": exponents(runs)} if name == "scaling" else {})


def check_arguments(only: tuple[str, ...], repeats: int) -> None:
    for part in only:
        if part not in PARTS:
            raise UserError(f"unknown part {part!r}{suggest(part, list(PARTS))}")
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")


def check_subject(folder: Path) -> Path:
    """The folder of a run as an absolute path."""
    for name in NEEDED:
        if not (folder / name).exists():
            raise UserError(
                f"{folder.resolve()} holds no {name}; run the pipeline there, up to train at least"
            )
    return folder.resolve()
