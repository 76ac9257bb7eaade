"""The history of a training run as a CSV file."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, TextIO

from rnp.io.files import read_rows
from rnp.training.distributed import is_main_process
from rnp.types import Epoch


class History:
    """A CSV file that grows by one row per epoch or step; each is flushed at once.

    Without a path, and in other processes than the main one, no file is written.
    """

    listeners: ClassVar[list[Callable[[dict[str, int | float]], None]]] = []
    """Called with every row of every history of this process."""

    def __init__(self, path: Path | None) -> None:
        self.path = path if is_main_process() else None
        self.file: TextIO | None = None

    def __call__(self, epoch: Epoch) -> None:
        """Append a row."""
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
    return [parse_epoch(row) for row in read_rows(path)]


def parse_epoch(row: dict[str, str]) -> Epoch:
    """An epoch from its row; columns that are no field of `Epoch` belong to `extra`."""
    values = {name: float(value) for name, value in row.items()}
    epoch = int(values.pop("epoch"))
    step = int(values.pop("step"))
    names = [field.name for field in dataclasses.fields(Epoch)]
    known = {name: values.pop(name) for name in names if name in values}
    return Epoch(epoch=epoch, step=step, **known, extra=values)
