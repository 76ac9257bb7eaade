"""Work: the multiply-adds of a computation, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rnp.training.predict import predict
from rnp.types import Bytes


@dataclass(frozen=True)
class Work:
    """Multiply-adds, and the passes of one image through the network that cost as many.

    A backward pass has as many multiply-adds as two forward passes: for weights and for inputs.
    """

    forward_multiply_adds: int
    backward_multiply_adds: int
    forward_passes: int
    backward_passes: int

    def __str__(self) -> str:
        return f"{self.forward_passes:,} forward, {self.backward_passes:,} backward"


@functools.cache
def formula_of(operator: Any) -> Callable[..., int] | None:
    """The function that gives the floating-point operations of a call; none for cheap operators."""
    return flop_registry.get(operator.overloadpacket)


class WorkCounter(TorchDispatchMode):
    """Counts the multiply-adds of convolutions and matrix products while it is entered.

    It changes no result. Replayed CUDA graphs are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = 0
        self.backward = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = formula_of(func)
        if formula is not None:
            multiply_adds = formula(*args, **(kwargs or {}), out_val=out) // 2
            if torch._C._current_autograd_node() is None:
                self.forward += multiply_adds
            else:
                self.backward += multiply_adds
        return out

    def work(self, one_pass: int) -> Work:
        """What was counted so far; `one_pass` are the multiply-adds of one image, forward."""
        return Work(
            forward_multiply_adds=self.forward,
            backward_multiply_adds=self.backward,
            forward_passes=round(self.forward / max(1, one_pass)),
            backward_passes=round(self.backward / max(1, 2 * one_pass)),
        )


def count_pass(model: nn.Module, images: Bytes) -> int:
    """The multiply-adds of a forward pass of one of `images`."""
    with WorkCounter() as counter:
        predict(model, images[:1])
    return counter.forward
