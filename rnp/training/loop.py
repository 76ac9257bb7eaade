"""The one training loop.

Unlearning, masks and distillation differ by objective, optimizer, `after_step` and stop rule.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rnp.errors import NonFiniteLossError, UserError
from rnp.training.augment import Augment, shrink
from rnp.training.cuda_graphs import CapturedStep, Step
from rnp.training.device import Precision, autocast, device_of
from rnp.training.distributed import ProcessGroup, SingleProcess
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

P = ParamSpec("P")
R = TypeVar("R")
Objective = Callable[[Images, Labels], tuple[Tensor, Logits]]
"""Batch -> the scalar to minimize, and the logits by which accuracy is counted."""
OnBatch = Callable[[Indices, Labels, Logits], None]
"""Called after each step: positions of the images, their labels, and their logits before it."""
WORTH_COMPILING = 10_000
"""Steps from which on a GPU saves more than compiling costs (results/cifar10/steps.csv)."""


def no_batch_callback(positions: Indices, labels: Labels, logits: Logits) -> None:
    """The default `on_batch`; does nothing."""


def with_seeded_globals(function: Callable[P, R]) -> Callable[P, R]:
    """Seed the global generators during a call of `function(model, ..., rng=...)`.

    Layers draw from them while they train (dropout, stochastic depth). The seed is that of `rng`;
    afterwards the global generators are restored, and the state of `rng` does not change.
    """

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> R:
        model = cast("nn.Module", args[0])
        rng = cast("torch.Generator", options["rng"])
        devices = range(torch.cuda.device_count()) if device_of(model).type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(rng.initial_seed())
            return function(*args, **options)

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
    image_scale: Callable[[float], float] = lambda epoch: 1.0,
    max_grad_norm: float | None = None,
    max_steps: int | None = None,
    precision: Precision = "fp32",
    after_step: Callable[[], None] = lambda: None,
    stop_step: Callable[[int], bool] = lambda step: False,
    stop_epoch: Callable[[Epoch], bool] = lambda epoch: False,
    on_epoch: OnEpoch = no_callback,
    on_batch: OnBatch = no_batch_callback,
    group: ProcessGroup | SingleProcess = SingleProcess(),
    cuda_graph: bool = False,
) -> list[Epoch]:
    """Minimize `objective` over shuffled batches of `data`, for the parameters of `optimizer`.

    `schedule` maps the epochs done so far, a fraction, to a factor on the learning rate, and
    `image_scale` to one on the side of the images. `after_step` runs after every step. The run
    ends early when `stop_step` (given the steps done) or `stop_epoch` returns true. The caller
    chooses the mode of `model` (train or eval). With `cuda_graph` a GPU replays captured steps,
    compiled ones in long runs; the optimizer must then come from `make_optimizer`, and
    `objective`, `after_step` and `model` must neither read values from the GPU nor branch on them.

    Drawn at random: the order and the augmentation of the images; all processes of `group` draw
    the same and then take their shards.

    Raises: NonFiniteLossError after an epoch whose loss was NaN or infinite; UserError when
    BatchNorm gets a single value.
    """
    device = device_of(model)
    data = move_to_gpu_if_it_fits(data, device)
    per_epoch = steps_per_epoch(len(data), batch_size)
    base_rates = [float(param_group["lr"]) for param_group in optimizer.param_groups]
    plain = Update(objective, optimizer, max_grad_norm, precision, after_step, group)
    update: Step = plain
    if cuda_graph and device.type == "cuda" and group.size == 1:
        compiled = plain.compile() if epochs * per_epoch >= WORTH_COMPILING else plain
        update = CapturedStep(compiled, plain, (batch_size, *data.shape))
    history: list[Epoch] = []
    step = 0
    stopped = False
    for epoch in range(epochs):
        totals = torch.zeros(3, dtype=torch.float64, device=device)
        for positions in shuffled_batches(data, batch_size, rng):
            progress = step / per_epoch
            set_learning_rates(optimizer, base_rates, schedule(progress))
            images, labels = load_batch(data, positions, device, augment, rng)
            images = shrink(images, image_scale(progress))
            shard_images, shard_labels = group.shard(images, labels)
            with explain_batchnorm_error(len(data), batch_size):
                loss, logits, norm = update(shard_images, shard_labels)
            on_batch(positions, labels, group.gather(logits, len(labels)))
            step += 1
            totals += batch_totals(loss, logits, shard_labels) * group.count_weight
            stopped = stop_step(step) or step == max_steps
            if stopped:
                break
        group.sum_over_processes(totals)
        history.append(summarize_epoch(epoch, step, totals, optimizer, norm))
        on_epoch(history[-1])
        if stopped or stop_epoch(history[-1]):
            break
    return history


@dataclasses.dataclass(frozen=True)
class Update:
    """A `Step`: forward and backward pass, clipped gradient, optimizer step, `after_step`."""

    objective: Objective
    optimizer: torch.optim.Optimizer
    max_grad_norm: float | None
    precision: Precision
    after_step: Callable[[], None]
    group: ProcessGroup | SingleProcess

    def __call__(self, images: Images, labels: Labels) -> tuple[Tensor, Logits, Tensor]:
        param_groups = self.optimizer.param_groups
        parameters = [p for param_group in param_groups for p in param_group["params"]]
        with autocast(self.precision, images.device):
            loss, logits = self.objective(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self.group.backward(loss, parameters)
        if self.max_grad_norm is None:
            norm = loss.new_zeros(())
        else:
            norm = nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.after_step()
        return loss.detach(), logits.detach(), norm

    def compile(self) -> Update:
        """The same update with a compiled objective."""
        return dataclasses.replace(self, objective=torch.compile(self.objective, dynamic=False))


def move_to_gpu_if_it_fits(data: ImageSet, device: torch.device) -> ImageSet:
    """`data` on the GPU if it takes at most half of the free memory there; else unchanged."""
    if device.type != "cuda" or data.images.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
        return data
    return ImageSet(data.images.to(device), data.labels.to(device), data.classes)


def shuffled_batches(data: ImageSet, batch_size: int, rng: torch.Generator) -> tuple[Indices, ...]:
    """Positions of the images of each batch, in random order; the last batch may be smaller."""
    order = torch.randperm(len(data), generator=rng)
    return order.to(data.labels.device).split(batch_size)


def load_batch(
    data: ImageSet,
    positions: Indices,
    device: torch.device,
    augment: Augment,
    rng: torch.Generator,
) -> tuple[Images, Labels]:
    """A batch on its device, augmented."""
    # From a memory map this copies 8 times as fast as an index in brackets.
    images = data.images.index_select(0, positions)
    augmented = augment(to_floats(to_device(images, device)), rng=rng)
    return augmented, to_device(data.labels[positions], device)


def set_learning_rates(
    optimizer: torch.optim.Optimizer, base_rates: list[float], factor: float
) -> None:
    """Set the learning rate of each parameter group to `factor` times its base rate.

    A tensor is changed in place, since a captured step reads it.
    """
    for param_group, base_rate in zip(optimizer.param_groups, base_rates):
        if isinstance(param_group["lr"], Tensor):
            param_group["lr"].fill_(base_rate * factor)
        else:
            param_group["lr"] = base_rate * factor


def make_optimizer(
    kind: Callable[..., torch.optim.Optimizer], model: nn.Module, *, lr: float, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer of all weights of `model`; on a GPU a fused one that can be captured."""
    device = device_of(model)
    if device.type != "cuda":
        return kind(model.parameters(), lr=lr, **options)
    if kind is not torch.optim.SGD:
        options["capturable"] = True
    rate = torch.tensor(lr, device=device)
    return kind(model.parameters(), lr=rate, fused=True, **options)


@contextlib.contextmanager
def explain_batchnorm_error(images: int, batch_size: int) -> Iterator[None]:
    """Raises: UserError in place of PyTorch's ValueError when BatchNorm gets a single value."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"BatchNorm cannot learn from a single value, and of {images} images in batches of"
            f" {batch_size} one batch has a single image; choose another batch_size"
        ) from error


def batch_totals(loss: Tensor, logits: Logits, labels: Labels) -> Float[Tensor, "3"]:
    """Sum of the losses, number of correct images, number of images.

    The result stays on the device, so that Python does not wait for a GPU.
    """
    images = len(labels)
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack(
        [loss.double() * images, correct.double(), correct.new_tensor(images).double()]
    )


def summarize_epoch(
    epoch: int,
    step: int,
    totals: Float[Tensor, "3"],
    optimizer: torch.optim.Optimizer,
    gradient_norm: Tensor,
) -> Epoch:
    """A row of the history, from the sum of `batch_totals` over an epoch.

    Raises: NonFiniteLossError when the loss is NaN or infinite.
    """
    loss, correct, images = totals.tolist()
    if not math.isfinite(loss):
        raise NonFiniteLossError(step)
    return Epoch(
        epoch=epoch,
        step=step,
        loss=loss / images,
        accuracy=correct / images,
        learning_rate=float(optimizer.param_groups[0]["lr"]),
        gradient_norm=float(gradient_norm),
    )


def steps_per_epoch(images: int, batch_size: int) -> int:
    return math.ceil(images / batch_size)


def cross_entropy(model: nn.Module, label_smoothing: float = 0.0) -> Objective:
    """The objective of ordinary training."""

    def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing), logits

    return objective


def multi_step(milestones: tuple[int, ...], gamma: float) -> Callable[[float], float]:
    """A schedule that multiplies the learning rate by `gamma` at each milestone, in epochs."""
    return lambda epoch: gamma ** sum(epoch >= milestone for milestone in milestones)


def half_cosine(steps: int, per_epoch: int) -> Callable[[float], float]:
    """A schedule that falls from 1 to 0 in `steps` steps, of which an epoch has `per_epoch`."""
    return lambda epoch: (1 + math.cos(math.pi * min(1.0, epoch * per_epoch / steps))) / 2
