"""A progress line with the current numbers while work is long; silent when the output is no
terminal.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rnp.training.distributed import is_main_process
from rnp.types import Epoch, OnEpoch


@contextlib.contextmanager
def progress(what: str, total: int | None, *listeners: OnEpoch) -> Iterator[OnEpoch]:
    """An epoch listener that moves the bar by one (of `total`, when it is known) and passes the
    epoch on to `listeners`.
    """

    def tell(epoch: Epoch) -> None:
        for listener in listeners:
            listener(epoch)

    if not (is_main_process() and sys.stderr.isatty()):
        yield tell
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, now="")

        def show(epoch: Epoch) -> None:
            tell(epoch)
            bar.update(task, advance=1, now=f"loss {epoch.loss:.3f}  accuracy {epoch.accuracy:.3f}")

        yield show
