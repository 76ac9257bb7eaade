"""Many attacks side by side on a machine with a GPU that has neither DVC nor a network.

`python -m benchmarks.campaign pack FOLDER` writes CIFAR-10 as files of half its size, which
`unpack FOLDER --data DIR` turns back. `run WORK --data DIR --attacks badnets,blend` runs the stages
of dvc.yaml up to `evaluate` in a folder for each attack, and those that all have in common once;
after a kill the same command continues. `collect WORK --out DIR` puts what `rnp collect` reads into
one file, however many stages have finished.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from benchmarks.parcel import MIB, pack, unpack
from benchmarks.pipeline import Stage, parameters, read_pipeline, stages
from benchmarks.subprocesses import MINUTE, ROOT, run_record
from rnp.errors import UserError
from rnp.io.files import atomic_write, write_text
from rnp.params.read import read_params
from rnp.reporting.provenance import provenance
from rnp.sweep.grid import PARAMS
from rnp.sweep.run import exclusive_folder, interruptible
from rnp.sweep.runners import ENV_MARKER, terminate_tree

COMMON = ("prepare", "benign")
"""The stages that run once for all attacks."""
SHARED = "shared"
"""The folder in which they run."""
KEPT = (PARAMS, "data/triggered/attack.json", "reports/**/*.json", "reports/**/*.csv", "logs/*")


def say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", flush=True)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A stage in its folder; `needs` are the records of the stages that run before it."""

    folder: Path
    stage: str
    command: tuple[str, ...]
    needs: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return f"{self.folder.name}/{self.stage}"

    @property
    def finished(self) -> bool:
        return run_record(self.folder, self.stage).is_file()

    @property
    def ready(self) -> bool:
        return all(record.is_file() for record in self.needs)

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
        write_params(work / name / PARAMS, params)
    tasks = []
    for name, params in configurations.items():
        tasks += tasks_of(work, name, stages(pipeline, params))
    return tasks


def write_params(file: Path, params: dict) -> None:
    """Write params.yaml; with other defenses than before the models are measured again."""
    before = read_params(file) if file.exists() else params
    if without_defenses(before) != without_defenses(params):
        raise UserError(f"{file.parent} was made with other parameters; name another folder")
    if before != params:
        run_record(file.parent, "evaluate").unlink(missing_ok=True)
    write_text(file, yaml.safe_dump(params, sort_keys=False))


def without_defenses(params: dict) -> dict:
    return params | {"defenses": {}, "evaluate": params["evaluate"] | {"defenses": []}}


def tasks_of(work: Path, name: str, pipeline: dict[str, Stage]) -> Iterator[Task]:
    """The tasks in the folder `name`; in place of the common stages it has links to `SHARED`."""
    folders = {stage: work / (SHARED if stage in COMMON else name) for stage in pipeline}
    for name_of_stage, stage in pipeline.items():
        common = name_of_stage in COMMON
        if common and name != SHARED:
            outs = [out for out in stage.outs if not out.startswith("reports/")]
            for path in (f"reports/{name_of_stage}", *outs):
                link(work / name / path, work / SHARED / path)
        elif common or name != SHARED:
            makers = [maker for maker in pipeline if overlap(stage.deps, pipeline[maker].outs)]
            yield Task(
                folder=folders[name_of_stage],
                stage=name_of_stage,
                command=stage.arguments(),
                needs=tuple(run_record(folders[maker], maker) for maker in makers),
            )


def overlap(deps: Sequence[str], outs: Sequence[str]) -> bool:
    """Whether a dependency is an output, or is inside one, or contains one."""
    pairs = [(Path(dep), Path(out)) for dep in deps for out in outs]
    return any(dep.is_relative_to(out) or out.is_relative_to(dep) for dep, out in pairs)


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(os.path.relpath(target, path.parent))


class Queue:
    """Tasks that run side by side, `workers` at a time, in their order where possible."""

    def __init__(self, tasks: Sequence[Task], workers: int, env: dict[str, str]) -> None:
        self.tasks = tasks
        self.workers = workers
        self.env = env
        self.start = time.monotonic()
        self.failed: set[Task] = set()
        self.running: dict[Task, tuple[subprocess.Popen[bytes], float]] = {}

    @property
    def left(self) -> list[Task]:
        return [task for task in self.tasks if not task.finished]

    def startable(self) -> list[Task]:
        """The tasks that could start now."""
        busy = {*self.failed, *self.running}
        return [task for task in self.left if task not in busy and task.ready]

    def fill(self) -> None:
        """Start as many tasks as there are free workers."""
        for task in self.startable()[: self.workers - len(self.running)]:
            self.running[task] = (task.start(self.env), time.monotonic())

    def reap(self) -> None:
        """Report the tasks that have ended."""
        now = time.monotonic()
        for task, (process, start) in list(self.running.items()):
            if process.poll() is None:
                continue
            del self.running[task]
            if process.returncode == 0 and task.finished:
                total = now - self.start
                say(f"{task} {now - start:.0f} s; {len(self.left)} left, {total:.0f} s in all")
            else:
                self.failed.add(task)
                lines = task.log.read_text(errors="replace").strip().split("\n")
                say(f"{task} FAILED, exit code {process.returncode}: {lines[-1][:300]}")


def work_off(
    tasks: Sequence[Task], *, workers: int, seconds: float, env: dict[str, str]
) -> list[Task]:
    """Run tasks; the ones that are left after `seconds`.

    What finished before does not run again. What runs when time is up keeps running.
    """
    queue = Queue(tasks, workers, env)
    while True:
        queue.reap()
        time_is_up = time.monotonic() - queue.start >= seconds
        if time_is_up or not (queue.running or queue.startable()):
            return queue.left
        queue.fill()
        time.sleep(0.2)


def run(options: argparse.Namespace) -> list[Task]:
    """The tasks that are left. Raises: UserError for parameters that no stage takes."""
    say(", ".join(provenance().values()))
    attacks = options.attacks.split(",")

    def make(attack: str) -> dict:
        return parameters(
            options.preset,
            seed=options.seed,
            attack=attack,
            defenses=options.defenses.split(","),
            changes=options.changes,
        )

    configurations = {SHARED: make("badnets"), **{attack: make(attack) for attack in attacks}}
    env = {
        "PYTHONPATH": str(ROOT),
        "RNP_TRACKING": "off",
        "RNP_DATA": str(options.data.resolve()),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.workers)),
    }
    work = options.work.resolve()
    seconds = options.minutes * MINUTE
    with exclusive_folder(work), interruptible():
        tasks = plan(work, configurations, read_pipeline())
        say(f"{sum(not task.finished for task in tasks)} of {len(tasks)} stages to run")
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
    parser = argument_parser()
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


def argument_parser() -> argparse.ArgumentParser:
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
        adders[name]("--data", type=Path, required=True, help="the folder of the data sets")
    adders["collect"]("--out", type=Path, required=True)
    add = adders["run"]
    add("--preset", default="cifar10")
    add("--seed", type=int, default=0)
    add("--attacks", required=True, help="names with commas between; the first have precedence")
    add("--defenses", default="rnp_ft,ft,anp", help="names with commas between")
    add("--workers", type=int, default=6, help="stages at a time")
    add("--minutes", type=float, default=9.0, help="what runs after them is ended")
    add("-S", "--set", action="append", default=[], dest="changes", metavar="NAME=VALUE")
    return parser


if __name__ == "__main__":
    main()
