"""Data-parallel training under torchrun: each process computes a shard of every batch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rnp.errors import UserError

SHARDABLE_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def world_size() -> int:
    """The number of processes that torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_main_process() -> bool:
    """Whether this process writes the files and logs to MLflow."""
    return world_size() == 1 or os.environ["RANK"] == "0"


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the shards of all processes, on any device; SyncBatchNorm needs a GPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        x = input.float()
        axes = [0, *range(2, x.dim())]
        shape = (1, -1, *[1] * (x.dim() - 2))
        count = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        dist.all_reduce(count)
        mean = all_reduce_sum(x.sum(axes)) / count  # [c]
        centered = x - mean.view(shape)
        variance = all_reduce_sum(centered.square().sum(axes)) / count
        if self.running_mean is not None:
            self._update_running(mean.detach(), variance.detach() * count / (count - 1))
        scaled = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(input.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, unbiased: Tensor) -> None:
        # A layer has all three buffers or none.
        batches = cast("Tensor", self.num_batches_tracked)
        batches += 1
        factor = self.momentum if self.momentum is not None else 1 / float(batches)
        cast("Tensor", self.running_mean).lerp_(mean, factor)
        cast("Tensor", self.running_var).lerp_(unbiased, factor)


class AllReduceSum(torch.autograd.Function):
    """The sum of a tensor over all processes.

    The results of all processes depend on each summand, so the gradient is summed as well.
    """

    @staticmethod
    def forward(context: object, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return AllReduceSum.forward(context, gradient)


def all_reduce_sum(value: Tensor) -> Tensor:
    """`AllReduceSum` of `value`."""
    return cast("Tensor", AllReduceSum.apply(value))  # PyTorch does not annotate `apply`


class SingleProcess:
    """The operations of `ProcessGroup` where a single process trains: nothing is exchanged."""

    size = 1
    count_weight = 1.0

    def shard(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, labels

    def gather(self, rows: Tensor, n: int) -> Tensor:
        return rows

    def backward(self, loss: Tensor, parameters: list[Tensor]) -> None:
        loss.backward()

    def sum_over_processes(self, totals: Tensor) -> None:
        pass


class ProcessGroup:
    """The processes that train `model` together.

    A batch with fewer images than processes is not sharded: each process computes all of it.

    `count_weight` is the weight of this process in sums over the images of the last batch.

    Raises: UserError when a layer of the model cannot share its statistics.
    """

    def __init__(self, model: nn.Module) -> None:
        self.size = dist.get_world_size()
        self.rank = dist.get_rank()
        self.layers = [
            (layer, type(layer))
            for layer in model.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ]
        for layer, kind in self.layers:
            if kind not in SHARDABLE_NORMS:
                raise UserError(
                    f"{kind.__name__} cannot be trained by several processes; run without torchrun"
                    " and RNP_PROCESSES"
                )
            cast("Any", layer).process_group = None  # an attribute that SyncBatchNorm reads
        self.loss_weight = 1.0
        self.count_weight = 1.0

    def share_statistics(self, shared: bool) -> None:
        """Compute BatchNorm statistics over all processes, or over one again.

        Only the class of the layers changes, so references to their weights, buffers and hooks
        stay valid.
        """
        for layer, kind in self.layers:
            on_gpu = layer.running_mean is not None and layer.running_mean.is_cuda
            synchronized = nn.SyncBatchNorm if on_gpu else SharedBatchNorm
            layer.__class__ = synchronized if shared else kind

    def shard(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The shard of this process; the sizes of shards differ by one image at most."""
        split = len(labels) >= self.size
        self.share_statistics(split)
        if not split:
            self.loss_weight = self.count_weight = 1 / self.size
            return images, labels
        own_images = images.tensor_split(self.size)[self.rank]
        own_labels = labels.tensor_split(self.size)[self.rank]
        self.loss_weight = len(own_labels) / len(labels)
        self.count_weight = 1.0
        return own_images, own_labels

    def gather(self, rows: Tensor, n: int) -> Tensor:
        """All-gather the rows of a sharded batch of `n`."""
        if len(rows) == n:  # the batch was too small to be sharded
            return rows
        gathered = rows.new_zeros(n, *rows.shape[1:])
        gathered.tensor_split(self.size)[self.rank].copy_(rows)
        dist.all_reduce(gathered)
        return gathered

    def backward(self, loss: Tensor, parameters: list[Tensor]) -> None:
        """The gradient of the mean over the whole batch, from the mean over this shard."""
        (loss * self.loss_weight).backward()
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts):
            gradient.copy_(part.view_as(gradient))

    def sum_over_processes(self, totals: Tensor) -> None:
        """Replace `totals` by its sum over all processes."""
        dist.all_reduce(totals)


@contextlib.contextmanager
def process_group(model: nn.Module) -> Iterator[ProcessGroup | SingleProcess]:
    """The processes that train `model` during the block.

    Raises: UserError when a layer of the model cannot share its statistics.
    """
    if world_size() == 1:
        yield SingleProcess()
        return
    dist.init_process_group("nccl" if next(model.parameters()).is_cuda else "gloo")
    try:
        group = ProcessGroup(model)
        try:
            yield group
        finally:
            group.share_statistics(False)
            for layer, _ in group.layers:
                del layer.process_group
    finally:
        dist.destroy_process_group()
