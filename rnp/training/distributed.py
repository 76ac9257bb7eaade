"""One training run by several processes, as torchrun starts them: each takes a slice of every
batch, together they are one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rnp.errors import UserError

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def world_size() -> int:
    """How many train together; 1 where torchrun has not started us."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_main_process() -> bool:
    """Whether this process writes the files and tells MLflow."""
    return world_size() == 1 or os.environ["RANK"] == "0"


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the slices of all processes, on any device; PyTorch's own SyncBatchNorm needs
    a GPU.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x, axes, shape = (
            input.float(),
            [0, *range(2, input.dim())],
            (1, -1, *[1] * (input.dim() - 2)),
        )
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        mean = AllReduceSum.apply(x.sum(axes)) / count  # [c]
        centerd = x - mean.view(shape)
        variance = AllReduceSum.apply(centerd.square().sum(axes)) / count
        if self.running_mean is not None:
            self._remember(mean.detach(), variance.detach() * count / (count - 1))
        scaled = centerd * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased: Tensor) -> None:
        self.num_batches_tracked += 1
        factor = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(unbiased, factor)


class AllReduceSum(torch.autograd.Function):
    """The sum over all processes; every one of them depends on our part, so that the gradient is a
    sum as well.
    """

    @staticmethod
    def forward(context: object, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return AllReduceSum.forward(context, gradient)


class ProcessGroup:
    """The processes that train `model`. A batch of fewer images than processes is worked out by
    each of them alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.size, self.rank = dist.get_world_size(), dist.get_rank()
        self.layers = [
            (layer, type(layer))
            for layer in model.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ]
        for layer, kind in self.layers:
            if kind not in BATCH_NORMS:
                raise UserError(
                    f"{kind.__name__} cannot be trained by several processes; run without torchrun"
                    " and RNP_PROCESSES"
                )
            layer.process_group = None  # SyncBatchNorm asks for it
        self.weight = self.counts = 1.0

    def share_statistics(self, on: bool) -> None:
        """By changing the class of the layers, whose weights, buffers and hooks stay the ones that
        others hold.
        """
        for layer, kind in self.layers:
            shared = (
                nn.SyncBatchNorm
                if layer.running_mean is not None and layer.running_mean.is_cuda
                else SharedBatchNorm
            )
            layer.__class__ = shared if on else kind

    def shard(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Our slice of a batch; slices differ by one image at most."""
        split = len(labels) >= self.size
        self.share_statistics(split)
        self.counts = 1.0 if split else 1 / self.size
        if not split:
            self.weight = 1 / self.size
            return images, labels
        images, kept = (part.tensor_split(self.size)[self.rank] for part in (images, labels))
        self.weight = len(kept) / len(labels)
        return images, kept

    def gather(self, ours: Tensor, n: int) -> Tensor:
        """The rows of all slices of a batch of `n`, from ours."""
        if len(ours) == n:  # the batch was too small to split
            return ours
        rows = ours.new_zeros(n, *ours.shape[1:])
        rows.tensor_split(self.size)[self.rank].copy_(ours)
        dist.all_reduce(rows)
        return rows

    def backward(self, loss: Tensor, parameters: list[nn.Parameter]) -> None:
        """The gradient of the mean over the whole batch, from the mean over our slice."""
        (loss * self.weight).backward()
        held = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in held])
        dist.all_reduce(flat)
        for grad, part in zip(held, flat.split([grad.numel() for grad in held])):
            grad.copy_(part.view_as(grad))


@contextlib.contextmanager
def process_group(model: nn.Module) -> Iterator[ProcessGroup | None]:
    """The processes that train `model` during the block; None when there is but one.

    Raises: UserError when a layer of the model cannot share its statistics.
    """
    if world_size() == 1:
        yield None
        return
    dist.init_process_group("nccl" if next(model.parameters()).is_cuda else "gloo")
    try:
        made = ProcessGroup(model)
        try:
            yield made
        finally:
            made.share_statistics(False)
            for layer, _ in made.layers:
                del layer.process_group
    finally:
        dist.destroy_process_group()
