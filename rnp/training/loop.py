"""The one training loop. Unlearning, masks and distillation differ by objective, optimizer,
`after_step` and stop rule.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rnp.errors import NonFiniteLossError, UserError
from rnp.training.augment import Augment, shrink
from rnp.training.cuda_graphs import CapturedStep
from rnp.training.device import Precision, autocast, device_of
from rnp.training.distributed import ProcessGroup
from rnp.types import (
    Epoch,
    Images,
    ImageSet,
    Indices,
    Labels,
    Logits,
    OnEpoch,
    no_callback,
    to_device,
    to_floats,
)

Objective = Callable[[Images, Labels], tuple[Tensor, Logits]]
"""Batch -> the scalar to minimize, and the logits by which accuracy is counted."""
OnBatch = Callable[[Indices, Labels, Logits], None]
"""Hears of each step: positions of its images in the set, their labels, and the logits before the
step.
"""
WORTH_COMPILING = (
    10_000  # steps; only then does a GPU save more than compiling takes (results/cifar10/steps.csv)
)


def with_seeded_globals(function: Callable) -> Callable:
    """What layers draw while they train (dropout, stochastic depth) comes from the global
    generator: it is set by the seed of `rng`, and afterwards as it was. `rng` itself does not
    move.
    """

    @functools.wraps(function)
    def run(
        model: nn.Module, *args: object, rng: torch.Generator, **options: object
    ) -> list[Epoch]:
        devices = range(torch.cuda.device_count()) if device_of(model).type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(rng.initial_seed())
            return function(model, *args, rng=rng, **options)

    return run


@with_seeded_globals
def fit(
    model: nn.Module,
    data: ImageSet,
    *,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    rng: torch.Generator,
    augment: Augment = Augment(crop=0, flip=False),
    schedule: Callable[[float], float] = lambda epoch: 1.0,
    side: Callable[[float], float] = lambda epoch: 1.0,
    clip_norm: float | None = None,
    max_steps: int | None = None,
    precision: Precision = "fp32",
    after_step: Callable[[], None] = lambda: None,
    stop_step: Callable[[int], bool] = lambda step: False,
    stop_epoch: Callable[[Epoch], bool] = lambda epoch: False,
    on_epoch: OnEpoch = no_callback,
    on_batch: OnBatch = lambda positions, labels, logits: None,
    together: ProcessGroup | None = None,
    graphed: bool = False,
) -> list[Epoch]:
    """Minimize `objective` over shuffled batches of `data`, changing in place whatever `optimizer`
    holds.

    `schedule` maps the epochs done so far, a fraction, to a factor on the learning rate, `side` to
    one on the side of the images; `after_step` runs after every step; `stop_step`, given the
    number of steps done, and `stop_epoch` end the run when true. The mode of `model` (train or
    eval) is the caller's. Drawn at random from `rng`: the order of the images and their
    augmentation; by each process of `together` alike, which then takes its slice of the batch.

    `graphed`, a GPU repeats recorded steps without Python, compiled ones where the run is long;
    the optimizer must come from `make_optimizer`, and `objective`, `after_step` and `model` must
    neither ask for values nor decide by them.

    Raises: NonFinite after an epoch whose loss was NaN or infinite; UserError when BatchNorm is
    given a single value.
    """
    device, per_epoch = device_of(model), steps_per_epoch(len(data), batch_size)
    data = move_to_gpu_if_it_fits(data, device)
    initial = [float(group["lr"]) for group in optimizer.param_groups]
    held = [p for group in optimizer.param_groups for p in group["params"]]

    def update(
        objective: Objective, images: Images, labels: Labels
    ) -> tuple[Tensor, Logits, Tensor]:
        with autocast(precision, device), explain_batchnorm_error(len(data), batch_size):
            loss, logits = objective(images, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward() if together is None else together.backward(loss, held)
        norm = (
            loss.new_zeros(()) if clip_norm is None else nn.utils.clip_grad_norm_(held, clip_norm)
        )
        optimizer.step()
        after_step()
        return loss.detach(), logits.detach(), norm

    advance = functools.partial(update, objective)
    if graphed and device.type == "cuda" and together is None:
        long = epochs * per_epoch >= WORTH_COMPILING
        quick = (
            functools.partial(update, torch.compile(objective, dynamic=False)) if long else advance
        )
        advance = CapturedStep(quick, advance, (batch_size, *data.shape))
    history, step, stopped = [], 0, False
    for epoch in range(epochs):
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for positions in (
            torch.randperm(len(data), generator=rng).to(data.labels.device).split(batch_size)
        ):
            for group, lr in zip(optimizer.param_groups, initial):
                set_lr(group, lr * schedule(step / per_epoch))
            images, labels = batch_of(data, positions, augment, side(step / per_epoch), device, rng)
            own, truth = (images, labels) if together is None else together.shard(images, labels)
            loss, logits, norm = advance(own, truth)
            on_batch(
                positions,
                labels,
                logits if together is None else together.gather(logits, len(labels)),
            )
            step += 1
            row = batch_totals(loss, logits, truth)
            sums += row if together is None else row * together.counts
            stopped = stop_step(step) or step == max_steps
            if stopped:
                break
        if together is not None:
            torch.distributed.all_reduce(sums)
        total, correct, seen = sums.tolist()
        if not math.isfinite(total):
            raise NonFiniteLossError(step)
        history.append(
            Epoch(
                epoch=epoch,
                step=step,
                loss=total / seen,
                accuracy=correct / seen,
                learning_rate=float(optimizer.param_groups[0]["lr"]),
                gradient_norm=float(norm),
            )
        )
        on_epoch(history[-1])
        if stopped or stop_epoch(history[-1]):
            break
    return history


def move_to_gpu_if_it_fits(data: ImageSet, device: torch.device) -> ImageSet:
    """`data` in the memory of a GPU, where they take no more than half of what is free; else as
    they are.
    """
    if device.type != "cuda" or data.images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return data
    return ImageSet(data.images.to(device), data.labels.to(device), data.classes)


def batch_of(
    data: ImageSet,
    positions: Indices,
    augment: Augment,
    side: float,
    device: torch.device,
    rng: torch.Generator,
) -> tuple[Images, Labels]:
    """A batch on its device, augmented, its images shrunk to `side` of theirs."""
    images = data.images.index_select(
        0, positions
    )  # from a map it copies 8 times as fast as an index in brackets
    return shrink(augment(to_floats(to_device(images, device)), rng=rng), side), to_device(
        data.labels[positions], device
    )


def set_lr(group: dict, lr: float) -> None:
    """A tensor stays the same one, for a recorded step reads it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def make_optimizer(
    kind: type[torch.optim.Optimizer], model: nn.Module, *, lr: float, **options: object
) -> torch.optim.Optimizer:
    """An optimizer of all weights of `model`; on a GPU one whose steps can be recorded, in one
    kernel.
    """
    device = device_of(model)
    if device.type == "cuda":
        options |= {"fused": True} | ({} if kind is torch.optim.SGD else {"capturable": True})
        lr = torch.tensor(lr, device=device)
    return kind(model.parameters(), lr=lr, **options)


@contextlib.contextmanager
def explain_batchnorm_error(images: int, batch_size: int) -> Iterator[None]:
    """Raises: UserError in place of PyTorch's ValueError when BatchNorm sees a single value."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"of {images} images in batches of {batch_size} one is left alone, and a BatchNorm that"
            " sees a single value learns nothing; choose another batch_size"
        ) from error


def batch_totals(loss: Tensor, logits: Logits, labels: Labels) -> Float[Tensor, "3"]:
    """Sum of the losses, images classified right, images; on the device, for nothing waits for it
    there.
    """
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack(
        [loss.double() * len(labels), correct.double(), correct.new_tensor(len(labels)).double()]
    )


def steps_per_epoch(images: int, batch_size: int) -> int:
    return math.ceil(images / batch_size)


def cross_entropy(model: nn.Module, label_smoothing: float = 0.0) -> Objective:
    def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing), logits

    return objective


def multi_step(milestones: tuple[int, ...], gamma: float) -> Callable[[float], float]:
    """Factor on the learning rate: times `gamma` at each milestone, in epochs."""
    return lambda epoch: gamma ** sum(epoch >= milestone for milestone in milestones)
