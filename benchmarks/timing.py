"""Seconds and memory of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from benchmarks.subprocesses import Result, peak_memory
from rnp.clock import Clock, now

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, Result]:
    """The result of `work`; its seconds and memory."""
    loaded = peak_memory()
    start = now()
    cpu = time.process_time()
    value = work()
    numbers: Result = {
        "seconds": now() - start,
        "cpu_seconds": time.process_time() - cpu,
        "loaded": loaded,
        "peak": peak_memory(),
    }
    if torch.cuda.is_available():
        numbers["peak_gpu"] = torch.cuda.max_memory_allocated()
    return value, numbers


def with_clock(step: T, clock: Clock, name: str) -> T:
    """A copy of a step of RNP (a frozen dataclass that is called) whose calls are timed."""
    kind: type = type(step)

    class Timed(kind):
        def __call__(self, *arguments: object, **options: object) -> object:
            with clock(name):
                return super().__call__(*arguments, **options)

    return Timed(**vars(step))
