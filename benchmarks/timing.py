"""Seconds, memory and multiply-adds of a piece of work."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.subprocesses import Result, peak_memory
from rnp.clock import Clock, now
from rnp.training.device import device_of
from rnp.types import ImageSet, to_floats

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


class MacCounter:
    """Multiply-adds of convolutions and linear layers in all forward passes meanwhile."""

    def __enter__(self) -> MacCounter:
        self.total = 0
        self.handle = nn.modules.module.register_module_forward_hook(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _count(self, module: nn.Module, _: object, output: Tensor) -> None:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            self.total += output.numel() * module.weight[0].numel()


def cost(model: nn.Module, data: ImageSet) -> int:
    """Multiply-adds of one image."""
    with MacCounter() as counter, torch.no_grad():
        model.eval()(to_floats(data.images[:1]).to(device_of(model)))
    return counter.total
