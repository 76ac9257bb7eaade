"""Whole training steps as CUDA graphs: a GPU repeats a recorded sequence of kernels and does not
wait for Python between them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from rnp.types import Images, Labels, Logits

Step = Callable[[Images, Labels], tuple[Tensor, Logits, Tensor]]
"""One update of the weights: loss, logits before it, and the norm of the gradient."""
WARM_UP = (
    3  # steps that run as they are first: they choose kernels and make the optimizer's buffers
)


class CapturedStep:
    """A step for batches of `shape`, recorded when it has run a few times; batches of other shapes
    go to `plain`.

    What cannot be compiled or recorded runs as it is, after a warning. What a step reads and
    writes must stay where it is: weights, buffers and the state of the optimizer do, a learning
    rate does as a tensor. Kernels are chosen by timing them, so that two runs round differently.
    """

    def __init__(self, compiled: Step, plain: Step, shape: tuple[int, ...]) -> None:
        self.compiled, self.plain, self.shape = compiled, plain, shape
        self.graph, self.seen = None, 0

    def __call__(self, images: Images, labels: Labels) -> tuple[Tensor, Logits, Tensor]:
        if tuple(images.shape) != self.shape:
            return self.plain(images, labels)
        self.seen += 1
        try:
            if self.seen <= WARM_UP:
                return self._run_on_side_stream(images, labels)
            if self.graph is None:
                self._record(images, labels)
        except (
            Exception
        ) as error:  # whatever a compiler or a recorder stumbles over, the step itself may work
            return self._fall_back(error)(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.made

    def _fall_back(self, error: Exception) -> Step:
        """To recording alone where compiling failed, to steps as they are where recording did."""
        warnings.warn(
            f"training is slower than it could be: {type(error).__name__}: {error}", stacklevel=2
        )
        if self.compiled is self.plain:
            self.shape = ()
        self.compiled, self.seen = self.plain, 0
        return self.plain

    def _run_on_side_stream(self, images: Images, labels: Labels) -> tuple[Tensor, Logits, Tensor]:
        """A step on a stream of its own, as recording wants it."""
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            made = self.compiled(images, labels)
        here.wait_stream(aside)
        return made

    def _record(self, images: Images, labels: Labels) -> None:
        """Recording computes nothing: the weights stay as they are."""
        self.images, self.labels = images.clone(memory_format=torch.preserve_format), labels.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.backends.cudnn.flags(enabled=True, benchmark=True):
            self.made = self.compiled(self.images, self.labels)
        self.graph = graph
