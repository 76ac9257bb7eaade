"""Training steps as CUDA graphs: the GPU replays recorded kernels without waiting for Python."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from rnp.types import Images, Labels, Logits

Step = Callable[[Images, Labels], tuple[Tensor, Logits, Tensor]]
"""One update of the weights: loss and logits before it, and the norm of the gradient."""
WARMUP_STEPS = 3
"""Steps before the capture; they choose kernels and create the buffers of the optimizer."""


class CapturedStep:
    """A step that is captured as a CUDA graph after a few calls, for batches of `shape`.

    Batches of other shapes go to `plain`. A step that cannot be compiled or captured runs as it
    is, after a warning. Everything that a step reads and writes must keep its address: weights,
    buffers and the state of the optimizer do, a learning rate does if it is a tensor. Kernels are
    chosen by timing them, so two runs may round differently.
    """

    def __init__(self, compiled: Step, plain: Step, shape: tuple[int, ...]) -> None:
        self.compiled = compiled
        self.plain = plain
        self.shape = shape
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warmup_steps = 0

    def __call__(self, images: Images, labels: Labels) -> tuple[Tensor, Logits, Tensor]:
        if tuple(images.shape) != self.shape:
            return self.plain(images, labels)
        # The step itself may work where the compiler or the capture fails, with whatever error.
        try:
            if self.warmup_steps < WARMUP_STEPS:
                self.warmup_steps += 1
                return self._run_on_side_stream(images, labels)
            graph = self.graph or self._capture(images, labels)
        except Exception as error:
            return self._fall_back(error)(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        graph.replay()
        return self.outputs

    def _fall_back(self, error: Exception) -> Step:
        """Stop compiling; if the plain step failed, stop capturing. Returns the plain step."""
        warnings.warn(
            f"training is slower than it could be: {type(error).__name__}: {error}", stacklevel=2
        )
        if self.compiled is self.plain:
            self.shape = ()
        self.compiled = self.plain
        self.warmup_steps = 0
        return self.plain

    def _run_on_side_stream(self, images: Images, labels: Labels) -> tuple[Tensor, Logits, Tensor]:
        """A step on a stream of its own, which a capture requires of the steps before it."""
        side_stream = torch.cuda.Stream()
        main_stream = torch.cuda.current_stream()
        side_stream.wait_stream(main_stream)
        with torch.cuda.stream(side_stream), choose_kernels_by_time():
            outputs = self.compiled(images, labels)
        main_stream.wait_stream(side_stream)
        return outputs

    def _capture(self, images: Images, labels: Labels) -> torch.cuda.CUDAGraph:
        """Record the step; nothing is computed, and the weights do not change."""
        self.images = images.clone(memory_format=torch.preserve_format)
        self.labels = labels.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), choose_kernels_by_time():
            self.outputs = self.compiled(self.images, self.labels)
        self.graph = graph
        return graph


def choose_kernels_by_time() -> contextlib.AbstractContextManager:
    """A context in which cuDNN takes the fastest kernels."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=True)
