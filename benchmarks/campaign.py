"""Many attacks side by side on a machine with a GPU that has neither DVC nor a network.

`python -m benchmarks.campaign pack FOLDER` writes CIFAR-10 as files of half its size, which
`unpack FOLDER --data DIR` turns back. `run WORK --data DIR --attacks badnets,blend` runs the stages
of dvc.yaml up to `evaluate`, a folder for each attack, what all have in common once; after a kill
the same command goes on. `collect WORK --out DIR` puts what `rnp rows` reads into one file, however
far the stages have come.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import os
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.parcel import MIB, pack, unpack
from benchmarks.pipeline import parameters, stages
from benchmarks.subprocesses import MINUTE, ROOT, ended
from rnp.errors import UserError
from rnp.io.files import atomic_write, write_text
from rnp.params.read import read_params
from rnp.reporting.provenance import provenance
from rnp.sweep.grid import PARAMS
from rnp.sweep.run import exclusive_folder, interruptible
from rnp.sweep.runners import ENV_MARKER, terminate_tree

COMMON, SHARED = ("prepare", "benign"), "shared"
"""The stages that run once for all attacks, and the folder in which they do."""
KEPT = (PARAMS, "data/triggered/attack.json", "reports/**/*.json", "reports/**/*.csv", "logs/*")


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A stage in its folder; `needs` are the files that others write last before it can start."""

    folder: Path
    stage: str
    command: tuple[str, ...]
    needs: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.folder.name}/{self.stage}"

    @property
    def done(self) -> bool:
        return ended(self.folder, self.stage).is_file()

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.stage}.log"

    def start(self, env: dict[str, str]) -> subprocess.Popen[bytes]:
        own = {"DVC_STAGE": self.stage, ENV_MARKER: str(self.folder)}
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("wb") as log:
            return subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=os.environ | env | own,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def plan(work: Path, configurations: dict[str, dict], pipeline: dict) -> list[Task]:
    """Make a folder for each of the `configurations`, of which one is `SHARED`; their tasks.

    Raises: UserError when a folder was made with other parameters, the choice of defenses aside.
    """
    for name, params in configurations.items():
        file = work / name / PARAMS
        before = read_params(file) if file.exists() else params
        if besides_defenses(before) != besides_defenses(params):
            raise UserError(f"{file.parent} was made with other parameters; name another folder")
        if before != params:
            ended(file.parent, "evaluate").unlink(missing_ok=True)
        write_text(file, yaml.safe_dump(params, sort_keys=False))
    tasks = []
    for name, params in configurations.items():
        found = stages(pipeline, params)
        place = {stage: work / (SHARED if stage in COMMON else name) for stage in found}
        for stage, facts in found.items():
            makers = [each for each in found if touch(facts["deps"], found[each]["outs"])]
            needs = tuple(ended(place[each], each) for each in makers)
            command = (sys.executable, *shlex.split(facts["cmd"])[1:])
            if stage in COMMON and name != SHARED:
                outs = [out for out in facts["outs"] if not out.startswith("reports/")]
                for path in (f"reports/{stage}", *outs):
                    link(work / name / path, work / SHARED / path)
            elif stage in COMMON or name != SHARED:
                tasks.append(Task(folder=place[stage], stage=stage, command=command, needs=needs))
    return tasks


def besides_defenses(params: dict) -> dict:
    return params | {"defenses": {}, "evaluate": params["evaluate"] | {"defenses": []}}


def touch(deps: Sequence[str], outs: Sequence[str]) -> bool:
    """Whether a dependency is an output, or lies in one, or holds one."""
    pairs = [(Path(dep), Path(out)) for dep in deps for out in outs]
    return any(dep.is_relative_to(out) or out.is_relative_to(dep) for dep, out in pairs)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(os.path.relpath(target, path.parent))


def work_off(
    tasks: Sequence[Task], *, workers: int, seconds: float, env: dict[str, str]
) -> list[Task]:
    """Run `workers` tasks at a time, in their order where possible; what is left after `seconds`.

    What has ended before does not run again. What runs when time is up goes on.
    """
    begun, failed = time.monotonic(), set[Task]()
    running: dict[Task, tuple[subprocess.Popen[bytes], float]] = {}
    while True:
        now = time.monotonic()
        for task, (process, start) in list(running.items()):
            if process.poll() is None:
                continue
            del running[task]
            if process.returncode == 0 and task.done:
                count = sum(not each.done for each in tasks)
                say(f"{task} {now - start:.0f} s; {count} left, {now - begun:.0f} s in all")
            else:
                failed.add(task)
                lines = task.log.read_text(errors="replace").strip().split("\n")
                say(f"{task} FAILED, exit code {process.returncode}: {lines[-1][:300]}")
        left = [task for task in tasks if not task.done]
        ready = [
            task
            for task in left
            if task not in failed
            and task not in running
            and all(each.is_file() for each in task.needs)
        ]
        if now - begun >= seconds or not (ready or running):
            return left
        for task in ready[: workers - len(running)]:
            running[task] = (task.start(env), now)
        time.sleep(0.2)


def run(options: argparse.Namespace) -> list[Task]:
    """The tasks that are left. Raises: UserError for parameters that no stage takes."""
    say(", ".join(provenance().values()))
    attacks, defenses = options.attacks.split(","), options.defenses.split(",")

    def make(attack):
        return parameters(
            options.preset,
            seed=options.seed,
            attack=attack,
            defenses=defenses,
            changes=options.changes,
        )

    configurations = {SHARED: make("badnets"), **{attack: make(attack) for attack in attacks}}
    threads = max(1, (os.cpu_count() or 1) // options.workers)
    env = {
        "PYTHONPATH": str(ROOT),
        "RNP_TRACKING": "off",
        "RNP_DATA": str(options.data.resolve()),
        "OMP_NUM_THREADS": str(threads),
    }
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    work, seconds = options.work.resolve(), options.minutes * MINUTE
    with exclusive_folder(work), interruptible():
        tasks = plan(work, configurations, pipeline)
        say(f"{sum(not task.done for task in tasks)} of {len(tasks)} stages to run")
        try:
            return work_off(tasks, workers=options.workers, seconds=seconds, env=env)
        finally:
            terminate_tree(work)


def collect(work: Path, out: Path) -> None:
    """Write OUT/campaign.tar.gz: parameters, reports and logs; no weights, no pictures."""
    file = out / "campaign.tar.gz"
    with atomic_write(file) as draft, tarfile.open(draft, "w:gz", dereference=True) as tar:
        for folder in sorted(path.parent for path in work.glob(f"*/{PARAMS}")):
            for pattern in KEPT:
                for name in sorted(glob.glob(pattern, root_dir=folder, recursive=True)):
                    tar.add(folder / name, f"{folder.name}/{name}")
    say(f"{file}: {file.stat().st_size / MIB:.2f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    adders = {
        name: commands.add_parser(name).add_argument
        for name in ("pack", "unpack", "run", "collect")
    }
    adders["pack"]("folder", type=Path)
    adders["pack"]("--limit", type=int, default=50, metavar="MIB", help="size of a part, at most")
    adders["unpack"]("folders", type=Path, nargs="+")
    for name in ("run", "collect"):
        adders[name]("work", type=Path, help="holds a folder for each attack")
    for name in ("unpack", "run"):
        adders[name]("--data", type=Path, required=True, help="where data sets lie")
    adders["collect"]("--out", type=Path, required=True)
    add = adders["run"]
    add("--preset", default="cifar10")
    add("--seed", type=int, default=0)
    add("--attacks", required=True, help="names with commas between; the first have precedence")
    add("--defenses", default="rnp_ft,ft,anp", help="names with commas between")
    add("--workers", type=int, default=6, help="stages at a time")
    add("--minutes", type=float, default=9.0, help="what runs after them is ended")
    add("-S", "--set", action="append", default=[], dest="changes", metavar="NAME=VALUE")
    options = parser.parse_args()
    try:
        if options.command == "pack":
            pack(options.folder, options.limit * MIB)
        elif options.command == "unpack":
            unpack(options.folders, options.data)
        elif options.command == "collect":
            collect(options.work, options.out)
        elif left := run(options):
            say(f"left: {', '.join(map(str, left))}")
            sys.exit(1)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
