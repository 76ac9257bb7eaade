"""The MLflow run of one stage. Nothing in here may stop or fail a stage."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from rnp.tracking.store import BATCH, Store, digest, now, tags, to_metrics

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIVE_AFTER = 60.0  # seconds after which a stage shows up in MLflow while it works


class StageRun:
    """The run of one stage, opened once the stage has lasted a while; `id` is None before, and
    where MLflow fails.

    Importing MLflow takes seconds, which short stages do not pay: `publish` makes their runs from
    the files they leave.
    """

    def __init__(self, stage: str, params: dict[str, object], attack: str) -> None:
        self.facts, self.start = (stage, params, attack), time.monotonic()
        self.store, self.id = None, None
        self.waiting: list[tuple[dict[str, float], int]] = []
        self.sent = self.start
        self._open_when_due()

    def _open_when_due(self) -> None:
        if self.store is None and time.monotonic() - self.start >= LIVE_AFTER:
            self._open()

    def _open(self) -> None:
        self.store = Store()
        self.id = self.store.guarded(self._create, *self.facts)

    def _create(self, stage: str, params: dict[str, object], attack: str) -> str:
        labels = tags("stage", stage, digest([stage, params]))
        return self.store.create(f"{stage}-{attack}", labels, params, time.monotonic() - self.start)

    def row(self, row: dict[str, float]) -> None:
        """Take one row of the history; rows travel together, every other second."""
        self.waiting.append((row, now()))
        if len(self.waiting) >= BATCH or time.monotonic() - self.sent > 2:
            self._open_when_due()
            self._send()

    def _send(self) -> None:
        if self.store is not None:
            waiting, self.waiting = self.waiting, []
            self.store.guarded(self._log, waiting)
        self.sent = time.monotonic()

    def _log(self, rows: list[tuple[dict[str, float], int]]) -> None:
        self.store.log(
            self.id,
            [point for row, when in rows for point in to_metrics(row, int(row["step"]), when=when)],
        )

    def results(self, report: Path, seconds: float) -> None:
        """Log what the stage left in its report folder."""
        self._open_when_due()
        self._send()
        if self.store is not None:
            self.store.guarded(self.store.log_report, self.id, report, seconds)

    def close(self, status: str, error: str) -> None:
        if self.store is None and status != "FINISHED":  # it leaves no files to make a run from
            self._open()
        self._send()
        if self.store is not None:
            self.store.guarded(self.store.close, self.id, status, error)


class Interrupted(SystemExit):
    """One of `SIGNALS`, with the exit code that a shell would report."""


@contextlib.contextmanager
def stage_run(stage: str, params: dict[str, object], attack: str) -> Iterator[StageRun]:
    """A run that ends as FINISHED, FAILED (exception, exit code) or KILLED (signal), as the block
    does.
    """

    def die(number: int, _: object) -> None:
        raise Interrupted(128 + number)

    handlers = {each: signal.getsignal(each) for each in SIGNALS}
    for each, handler in handlers.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(each, die)
    run, status, error = None, "FAILED", ""
    try:
        run = StageRun(stage, params, attack)
        yield run
        status = "FINISHED"
    except Interrupted:
        status = "KILLED"
        raise
    except BaseException as failure:
        status = "FINISHED" if isinstance(failure, SystemExit) and not failure.code else "FAILED"
        error = "" if status == "FINISHED" else traceback.format_exc()
        raise
    finally:
        for each in handlers:
            signal.signal(
                each, signal.SIG_IGN
            )  # a second Ctrl-C would leave the run open; closing takes seconds at most
        if run is not None:
            run.close(status, error)
        for each, handler in handlers.items():
            signal.signal(each, handler)
