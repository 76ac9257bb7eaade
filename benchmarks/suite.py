"""The benchmark: `make bench` or `rnp bench` runs its parts, keeps their raw numbers in a JSON
file and writes tables of them.

A part that is run again takes the place of its older numbers; the others stay, each with its own
machine, versions and date. What fails is kept as failed. On a GPU a part has a name of its own
(`train_cuda`), so that it does not take the place of the CPU's.
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

from benchmarks.report import headline, markdown
from benchmarks.scaling import draw, exponents
from benchmarks.subprocesses import (
    ROOT,
    Failed,
    Result,
    Runs,
    busy,
    call,
    ended,
    measure,
    measure_untouched,
    repeat,
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
IMAGES = 500  # clean ones, and as many triggered ones, for the detectors of samples
BASE = {"images": 250, "width": 16, "max_fraction": 0.02, "side": 32}
AXES = {
    "images": (100, 250, 500, 1000),
    "width": (16, 32, 64),
    "max_fraction": (0.02, 0.04, 0.08, 0.16),
    "side": (32, 48, 64),
}
START = """
import time
from rnp.cli.prune import prune
from stages.stage import run
prune.callback = lambda **_: print(time.clock_gettime(time.CLOCK_MONOTONIC))
run(prune)
"""
SHIM = """#!{python} -IS
import json, os, sys, time
start = time.monotonic()
pid = os.spawnv(os.P_NOWAIT, {python!r}, [{python!r}, *sys.argv[1:]])
_, status, usage = os.wait4(pid, 0)
if "DVC_STAGE" in os.environ:
    with open({log!r}, "a") as file:
        line = {{"stage": os.environ["DVC_STAGE"], "seconds": time.monotonic() - start, "peak": usage.ru_maxrss * 1024}}
        print(json.dumps(line), file=file)
sys.exit(os.waitstatus_to_exitcode(status))
"""


class BenchFixtures:
    """Folders that several parts need, each made when it is asked for first."""

    def __init__(self, folder: Path, run: Path | None, repeats: int, quick: bool) -> None:
        self.folder, self.run, self.repeats, self.quick = folder, run, repeats, quick

    def new(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder))

    @functools.cached_property
    def subject(self) -> Path:
        """The run to work on; without one the preset demo up to its unlearned model, by the
        commands and without DVC.
        """
        if self.run:
            return self.run
        folder = self.new("subject")
        say("  a model to defend: demo, by the commands")
        write_text(folder / "params.yaml", render("demo"))
        params = read_params(folder / "params.yaml")

        def command(name: str, *sections: str, **paths: str) -> None:
            call(
                sys.executable,
                "-m",
                "rnp",
                name,
                "--report",
                f"reports/{name}",
                "--seed",
                str(params["seed"]),
                *(word for option, path in paths.items() for word in (f"--{option}", path)),
                *(word for section in sections for word in flags(params[section])),
                folder=folder,
            )

        pool, test, benign, model = (
            "data/pool",
            "data/test",
            "models/benign.safetensors",
            "models/backdoored.safetensors",
        )
        command("prepare", "data", "datasets", out="data")
        command("benign", "model", "train", pool=pool, test=test, out=benign)
        command("poison", "poison", "attacks", pool=pool, benign=benign, out="data/poisoned")
        command(
            "train",
            "model",
            "train",
            pool=pool,
            poisoned="data/poisoned",
            test=test,
            benign=benign,
            out=model,
            triggered="data/triggered",
        )
        command("unlearn", "unlearn", model=model, defense="data/defense", out="models/unlearned")
        return folder

    @functools.cached_property
    def finished(self) -> tuple[Path, Result]:
        """A new clone of this checkout in which the whole pipeline of demo has run, and how long
        that took.
        """
        base = self.new("demo")
        clone, log, shim = base / "clone", base / "stages.jsonl", base / "bin/python"
        call("git", "clone", "-q", ROOT, clone)
        write_text(clone / "params.yaml", render("demo"))
        env, start = environment(), time.monotonic()
        call(sys.executable, "-m", "rnp", "setup", folder=clone, env=env)
        setup = time.monotonic() - start
        write_text(shim, SHIM.format(python=sys.executable, log=str(log)))
        shim.chmod(0o755)
        start = time.monotonic()
        call(
            sys.executable,
            "-m",
            "dvc",
            "repro",
            "-q",
            folder=clone,
            env=env | {"PATH": f"{shim.parent}:{env['PATH']}"},
        )
        seconds = time.monotonic() - start
        stages = [json.loads(line) for line in log.read_text().splitlines()]
        for stage in stages:
            report = ended(clone, stage["stage"])
            stage["work"] = read_json(report)["seconds"] if report.exists() else None
        return clone, {"seconds": seconds, "setup_seconds": setup, "stages": stages}


def environment() -> dict[str, str]:
    """That of a user who has just activated the environment: the code and the store are those of
    the folder.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("DVC_", "MLFLOW_")) and name != "PYTHONPATH"
    }
    return env | {"PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def flags(section: dict, prefix: str = "") -> list[str]:
    """A section of params.yaml as options of a command, as DVC writes them."""
    words = []
    for key, value in section.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            words += flags(value, f"{name}.")
        elif isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        else:
            words += [
                word
                for each in (value if isinstance(value, list) else [value])
                for word in (f"--{name}", str(each))
            ]
    return words


def train(shop: BenchFixtures) -> Runs:
    device = default_device().type
    size = SIZES.get(device, SIZES["cpu"])
    fewer, workers = size | FEWER.get(device, {}), 2 if device == "cpu" else os.cpu_count()
    return repeat(
        {
            "plain": lambda: measure("train_plain", **fewer, workers=workers) | fewer,
            "ours": lambda: measure("train_ours", **size, precision="auto") | size,
            "ours, fp32": lambda: measure("train_ours", **fewer, precision="fp32") | fewer,
        },
        shop.repeats,
    )


def waiting(shop: BenchFixtures) -> Runs:
    """Two ways for threads to wait, on a quiet machine and beside a process that takes a core."""
    size = {"steps": 100, "limit": 30.0}

    def beside(ask: Callable[..., Result]) -> Result:
        with busy():
            return ask("training_steps", **size)

    return repeat(
        {
            "ours, alone": lambda: measure("training_steps", **size),
            "untouched, alone": lambda: measure_untouched("training_steps", **size),
            "ours, beside a busy process": lambda: beside(measure),
            "untouched, beside a busy process": lambda: beside(measure_untouched),
        },
        shop.repeats,
    )


def rnp(shop: BenchFixtures) -> Runs:
    folder = str(shop.subject)
    ours = repeat(
        {
            "ours": lambda: measure("rnp_ours", folder=folder, until_collapse=False),
            "ours, to collapse": lambda: measure("rnp_ours", folder=folder, until_collapse=True),
        },
        shop.repeats,
    )
    if isinstance(ours["ours"], dict):
        return ours | {"published": {"failed": "ours failed, whose number of steps it takes"}}
    steps = {name: ours["ours"][0][name] for name in ("unlearn_steps", "recover_steps")}
    return ours | repeat(
        {"published": lambda: measure("rnp_published", folder=folder, **steps, quick=shop.quick)},
        shop.repeats,
    )


def defenses(shop: BenchFixtures) -> Runs:
    folder = str(shop.subject)
    others = {
        name: functools.partial(measure, "defense", folder=folder, name=name)
        for name in names("defense")
    }
    return repeat({"rnp": lambda: measure("defense_rnp", folder=folder), **others}, shop.repeats)


def detectors(shop: BenchFixtures) -> Runs:
    folder = str(shop.subject)
    asked = {
        f"{family}/{name}": functools.partial(
            measure, "detector", folder=folder, family=family, name=name, images=IMAGES
        )
        for family in ("triggers", "labels", "samples")
        for name in names(family)
    }
    return repeat({"rnp": lambda: measure("defense_rnp", folder=folder), **asked}, shop.repeats)


def poison(shop: BenchFixtures) -> Runs:
    return repeat(
        {name: functools.partial(measure, "poison", name=name) for name in names("attack")},
        shop.repeats,
    )


def start(shop: BenchFixtures) -> Runs:
    """From the start of the process to the call of the stage's function: imports, options, the
    check of params.yaml.
    """
    folder = shop.new("start")
    write_text(folder / "params.yaml", render("demo"))
    arguments = [
        word
        for name in ("model", "masks", "defense", "out", "report")
        for word in (f"--{name}", ".")
    ]

    def stage(tracking: str) -> Result:
        env = {**os.environ, "PYTHONPATH": str(ROOT), "RNP_TRACKING": tracking}
        begun = time.clock_gettime(time.CLOCK_MONOTONIC)
        called = float(
            call(sys.executable, "-c", START, *arguments, folder=folder, env=env).split()[-1]
        )
        return {
            "seconds": called - begun,
            "whole_seconds": time.clock_gettime(time.CLOCK_MONOTONIC) - begun,
        }

    def import_torch() -> Result:
        begun = time.monotonic()
        call(sys.executable, "-c", "import torch")
        return {"seconds": time.monotonic() - begun}

    stage("off")  # files come from the disk once
    return repeat(
        {
            "stage, tracking on": lambda: stage("on"),
            "stage, tracking off": lambda: stage("off"),
            "import torch": import_torch,
        },
        shop.repeats,
    )


def demo(shop: BenchFixtures) -> Runs:
    return repeat({"pipeline": lambda: shop.finished[1]}, 1)


def noop(shop: BenchFixtures) -> Runs:
    clone, _ = shop.finished

    def again() -> Result:
        begun = time.monotonic()
        said = call(sys.executable, "-m", "dvc", "repro", folder=clone, env=environment())
        if "Running stage 'prepare'" in said or "Running stage 'prune'" in said:
            raise Failed("it was no no-op: stages ran again")
        return {"seconds": time.monotonic() - begun}

    return repeat({"repro": again}, shop.repeats)


def scaling(shop: BenchFixtures) -> Runs:
    """One thing at a time grows from `BASE`; the names of the runs are axis/value/phase."""
    found, made = {}, {}
    for axis, value in ((axis, value) for axis, values in AXES.items() for value in values):
        point = BASE | {axis: value}
        width, side = point["width"], point["side"]
        folder = shop.folder / f"scale_{width}_{side}"
        if not folder.exists():
            folder.mkdir()
            trained = {
                f"subject/{width}x{side}": lambda: measure(
                    "scale_subject", folder=str(folder), width=width, side=side
                )
            }
            found |= repeat(trained, 1)
        key = tuple(point.values())
        say(f"  {axis} {value}")
        if key not in made:  # the base is a point of each axis
            common = {"folder": str(folder), "images": point["images"]}
            made[key] = repeat(
                {
                    "unlearn": lambda: measure("scale_unlearn", **common),
                    "recover": lambda: measure("scale_recover", **common),
                    "prune": lambda: measure(
                        "scale_prune", **common, max_fraction=point["max_fraction"]
                    ),
                },
                shop.repeats,
            )
        found |= {f"{axis}/{value}/{phase}": runs for phase, runs in made[key].items()}
    return found


PARTS: dict[str, Callable[[BenchFixtures], Runs]] = {
    part.__name__: part
    for part in (start, train, waiting, poison, rnp, defenses, detectors, demo, noop, scaling)
}


def facts(run: Path | None, quick: bool) -> dict[str, object]:
    """Where the numbers of a part come from."""
    device = default_device()
    whose = read_params(run / "params.yaml").get("preset", "unnamed") if run else "demo"
    return {
        "made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        "commit": git_commit(),
        "device": device.type,
        "machine": hardware(),
        "versions": dict(versions()),
        "threads": torch.get_num_threads(),
        "subject": whose,
        "quick": quick,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def hardware() -> dict[str, object]:
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    )
    return {
        "name": device_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "bf16": half_precision("auto", default_device()),
    }


def merge(old: dict, part: str, new: dict[str, object]) -> dict[str, object]:
    """The record with a part in place of its older numbers, and the head lines that follow from
    all parts.
    """
    parts = {
        **old.get("parts", {}),
        part if new["device"] == "cpu" else f"{part}_{new['device']}": new,
    }
    return {
        **{name: new[name] for name in ("machine", "versions", "threads")},
        "parts": parts,
        **headline(parts),
    }


def failures(record: dict, parts: list[str]) -> list[str]:
    """What failed among the parts just run, by name."""
    found = []
    for name, part in record["parts"].items():
        if name.partition("_")[0] in parts:
            found += (
                [name]
                if "failed" in part
                else [
                    f"{name}/{run}" for run, done in part["runs"].items() if isinstance(done, dict)
                ]
            )
    return found


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
    """Run the named parts, all if none is named; files are written after each. What failed is
    returned, by name.

    Raises: UserError when there is no such part, or no such run.
    """
    for part in only:
        if part not in PARTS:
            raise UserError(f"unknown part {part!r}{suggest(part, list(PARTS))}")
    if repeats < 1:
        raise UserError(f"repeats must be at least 1, got {repeats}")
    if subject:
        subject = subject.resolve()
        for needed in (
            "params.yaml",
            "models/backdoored.safetensors",
            "data/defense",
            "data/test",
            "data/triggered/test",
        ):
            if not (subject / needed).exists():
                raise UserError(
                    f"{subject} holds no {needed}; run the pipeline there, up to train at least"
                )
    record = read_json(raw) if raw.exists() else {}
    chosen = [part for part in PARTS if part in only] or list(PARTS)
    with tempfile.TemporaryDirectory(prefix="rnp-bench-") as folder:
        shop = BenchFixtures(Path(folder), subject, repeats, quick)
        for part in chosen:
            say(part)
            new = facts(subject, quick)
            try:
                new["runs"] = PARTS[part](shop)
            except Failed as error:
                say(f"  FAILED: {error}")
                new["failed"] = str(error)
            if part == "scaling" and "runs" in new:
                new["exponents"] = exponents(new["runs"])
                draw(plot, new)
            record = merge(record, part, new)
            write_json(raw, record)
            write_text(page, markdown(record, picture=os.path.relpath(plot, page.parent)))
    return failures(record, chosen)
