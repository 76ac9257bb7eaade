"""`dvc repro` in one of several copies that share a cache: equal stages run once.

The other copies wait, and take the results from the cache. This is a script, not a module: `python
-P repro_once.py LOCKS [TARGET]`, since it runs DVC alone, wherever `rnp` is imported from.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dvc.cli import main
from dvc.exceptions import DvcException
from dvc.stage import Stage


@contextlib.contextmanager
def stage_lock(locks: Path, stage: Stage) -> Iterator[None]:
    """Hold a file lock of the stage's command and dependencies; it ends with the process."""
    try:
        hashes = sorted((dep.def_path, str(dep.get_hash())) for dep in stage.deps)
    except (DvcException, OSError):  # a missing dependency: DVC reports it better
        yield
        return
    name = hashlib.sha256(repr([stage.cmd, hashes]).encode()).hexdigest()
    with (locks / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def lock_stages(locks: Path) -> None:
    """Wrap `Stage.run`, which includes the look-up in the run cache and the saving."""
    run = Stage.run

    def run_locked(self: Stage, *arguments: Any, **options: Any) -> None:
        with stage_lock(locks, self):
            run(self, *arguments, **options)

    Stage.run = run_locked


if __name__ == "__main__":
    lock_stages(Path(sys.argv[1]))
    sys.exit(main(["repro", *sys.argv[2:]]))
