"""The history of a training run as a CSV file."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path

from rnp.io.files import read_rows
from rnp.training.distributed import is_main_process
from rnp.types import Epoch


class History:
    """A CSV that grows by one row per epoch or step, flushed at once; `listeners` hear every row
    of this process.
    """

    listeners: list[Callable[[dict[str, float]], None]] = []

    def __init__(self, path: Path | None) -> None:
        self.path, self.file = path if is_main_process() else None, None

    def __call__(self, epoch: Epoch) -> None:
        row = epoch.row()
        for listener in self.listeners:
            listener(row)
        if self.path is None:
            return
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("w", newline="")
            self.writer = csv.DictWriter(self.file, row, lineterminator="\n")
            self.writer.writeheader()
        self.writer.writerow({key: f"{value:.6g}" for key, value in row.items()})
        self.file.flush()

    def __enter__(self) -> History:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()


def read_trajectory(path: Path) -> list[Epoch]:
    """The rows of a history, as `Epoch.row` wrote them."""
    rows = []
    for row in read_rows(path):
        own = {
            f.name: (int if f.name in ("epoch", "step") else float)(row.pop(f.name))
            for f in dataclasses.fields(Epoch)
            if f.name != "extra"
        }
        rows.append(Epoch(**own, extra={key: float(value) for key, value in row.items()}))
    return rows
