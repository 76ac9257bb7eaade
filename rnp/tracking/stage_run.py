"""The MLflow run of one stage. Nothing in here may stop or fail a stage."""

from __future__ import annotations

import contextlib
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from rnp.tracking.store import METRICS_PER_CALL, Store, digest, now, tags, to_metrics

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIVE_AFTER = 60.0  # seconds after which a stage shows up in MLflow while it works
SEND_EVERY = 2.0  # seconds
Rows = list[tuple[dict[str, float], int]]
"""Rows of a history, each with the time at which it arrived."""


class StageRun:
    """The run of one stage, opened once the stage has lasted a while.

    `id` is None before that, and where MLflow fails. Importing MLflow takes seconds, which short
    stages do not pay: `publish` makes their runs from the files they leave.
    """

    def __init__(self, stage: str, params: dict[str, object], attack: str) -> None:
        self.stage = stage
        self.params = params
        self.attack = attack
        self.start = time.monotonic()
        self.sent = self.start
        self.waiting: Rows = []
        self.store: Store | None = None
        self.id: str | None = None
        self._open_when_due()

    def _open_when_due(self) -> None:
        if self.store is None and time.monotonic() - self.start >= LIVE_AFTER:
            self._open()

    def _open(self) -> None:
        self.store = Store()
        self.id = self.store.guarded(self._create, self.store)

    def _create(self, store: Store) -> str:
        labels = tags("stage", self.stage, digest([self.stage, self.params]))
        seconds = time.monotonic() - self.start
        return store.create(f"{self.stage}-{self.attack}", labels, self.params, seconds)

    def row(self, row: dict[str, float]) -> None:
        """Take one row of the history; rows are sent together, every other second."""
        self.waiting.append((row, now()))
        if len(self.waiting) >= METRICS_PER_CALL or time.monotonic() - self.sent > SEND_EVERY:
            self._open_when_due()
            self._send()

    def _send(self) -> None:
        if self.store is not None:
            rows = self.waiting
            self.waiting = []  # first: a signal may interrupt the sending
            self.store.guarded(log_rows, self.store, self.id, rows)
        self.sent = time.monotonic()

    def results(self, report: Path, costs: dict[str, float]) -> None:
        """Log what the stage left in its report folder, and its seconds and multiply-adds."""
        self._open_when_due()
        self._send()
        if self.store is not None:
            self.store.guarded(self.store.log_report, self.id, report, costs)

    def close(self, status: str, error: str) -> None:
        if self.store is None and status != "FINISHED":  # it leaves no files to make a run from
            self._open()
        self._send()
        if self.store is not None:
            self.store.guarded(self.store.close, self.id, status, error)


def log_rows(store: Store, run_id: str, rows: Rows) -> None:
    points = [to_metrics(row, int(row["step"]), when=when) for row, when in rows]
    store.log(run_id, [metric for metrics in points for metric in metrics])


class Interrupted(SystemExit):
    """One of `SIGNALS` arrived; the exit code is the one that a shell would report."""


@contextlib.contextmanager
def stage_run(stage: str, params: dict[str, object], attack: str) -> Iterator[StageRun]:
    """A run that ends with the block: FINISHED, FAILED (exception, exit code), KILLED (signal)."""

    def interrupt(number: int, _: object) -> None:
        raise Interrupted(128 + number)

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    run = None
    status = "FAILED"
    error = ""
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
        # A second Ctrl-C would leave the run open; closing takes seconds at most.
        for number in handlers:
            signal.signal(number, signal.SIG_IGN)
        if run is not None:
            run.close(status, error)
        for number, handler in handlers.items():
            signal.signal(number, handler)
