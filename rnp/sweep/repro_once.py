"""`dvc repro` for one of several copies that share a cache: of equal stages one runs, the others
wait and take its results.

A script, not a module: `python -P repro_once.py LOCKS [TARGET]`, for it is DVC that it runs,
wherever `rnp` comes from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

from dvc.cli import main
from dvc.exceptions import DvcException
from dvc.stage import Stage


@contextlib.contextmanager
def turn(locks: Path, stage: Stage) -> Iterator[None]:
    """Nobody else is at a stage with this command and these dependencies; the lock falls with the
    process that holds it.
    """
    try:
        facts = repr([stage.cmd, sorted((dep.def_path, str(dep.get_hash())) for dep in stage.deps)])
    except (DvcException, OSError):  # what is missing, DVC names in better words
        yield
        return
    with (locks / hashlib.sha256(facts.encode()).hexdigest()).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def take_turns(locks: Path) -> None:
    """From `run` on a stage is looked up in the run cache, works, and is saved there."""
    run = Stage.run

    def run_in_turn(stage: Stage, *arguments: object, **options: object) -> None:
        with turn(locks, stage):
            run(stage, *arguments, **options)

    Stage.run = run_in_turn


if __name__ == "__main__":
    take_turns(Path(sys.argv[1]))
    sys.exit(main(["repro", *sys.argv[2:]]))
