"""Measure seconds, by name."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def now() -> float:
    """Seconds from an arbitrary start, read when a GPU has finished its work."""
    torch = sys.modules.get("torch")  # loaded only where something needs it
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """The result of `work`, and the seconds that it took."""
    start = now()
    result = work()
    return result, now() - start


class Clock:
    """Seconds by name: `with clock("name"): work`; those of equal names are added up.

    `cpu` are the seconds of all threads on the processor.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = now()
        cpu = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + now() - start
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
