"""The one training loop. Unlearning, masks and distillation differ by objective, optimiser, `after_step` and stop rule."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp.augment import Augment
from rnp.errors import NonFinite, UserError
from rnp.models.parallel import Team, processes, team
from rnp.types import Epoch, ImageSet, Images, Labels, Logits, OnEpoch, ignore, to_floats

Objective = Callable[[Images, Labels], tuple[Tensor, Logits]]
"""Batch -> the scalar to minimise, and the logits by which accuracy is counted."""
Precision = Literal["fp32", "bf16", "auto"]
EVAL_BATCH = 500


def default_device() -> torch.device:
    """`RNP_DEVICE`, else a GPU when there is one (under torchrun one for each process), else the CPU.

    Raises: UserError when `RNP_DEVICE` names no device of this machine.
    """
    wanted = os.environ.get("RNP_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and processes() > 1:
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"RNP_DEVICE={wanted!r} is no device of this machine; try cpu") from error


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def half_precision(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bf16; `auto` does where the hardware multiplies it natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    on = half_precision(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16) if on else contextlib.nullcontext()


def fit(
    model: nn.Module,
    data: ImageSet,
    *,
    objective: Objective,
    optimiser: torch.optim.Optimizer,
    epochs: int,
    batch_size: int,
    rng: torch.Generator,
    augment: Augment = Augment(crop=0, flip=False),
    schedule: Callable[[float], float] = lambda epoch: 1.0,
    clip_norm: float | None = None,
    max_steps: int | None = None,
    precision: Precision = "fp32",
    after_step: Callable[[], None] = lambda: None,
    stop_step: Callable[[int], bool] = lambda step: False,
    stop_epoch: Callable[[Epoch], bool] = lambda epoch: False,
    on_epoch: OnEpoch = ignore,
    together: Team | None = None,
) -> list[Epoch]:
    """Minimise `objective` over shuffled batches of `data`, changing in place whatever `optimiser` holds.

    `schedule` maps the epochs done so far, a fraction, to a factor on the learning rate; `after_step` runs after every
    step; `stop_step`, given the number of steps done, and `stop_epoch` end the run when true. The mode of `model` (train or eval) is the
    caller's. Drawn at random from `rng`: the order of the images and their augmentation; by each process of `together` alike,
    which then takes its slice of the batch.

    Raises: NonFinite after an epoch whose loss was NaN or infinite.
    """
    device = device_of(model)
    per_epoch = steps_per_epoch(len(data), batch_size)
    initial = [group["lr"] for group in optimiser.param_groups]
    held = [p for group in optimiser.param_groups for p in group["params"]]
    history, step, stopped = [], 0, False
    for epoch in range(epochs):
        sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss * n, correct, n
        norm = torch.zeros(())
        for positions in torch.randperm(len(data), generator=rng).split(batch_size):
            for group, lr in zip(optimiser.param_groups, initial):
                group["lr"] = lr * schedule(step / per_epoch)
            images = augment(to_floats(data.images[positions].to(device)), rng=rng)
            images = images.contiguous(memory_format=torch.channels_last)
            labels = data.labels[positions].to(device)
            if together is not None:
                images, labels = together.take(images, labels)
            with autocast(precision, device):
                loss, logits = objective(images, labels)
            optimiser.zero_grad(set_to_none=True)
            loss.backward() if together is None else together.backward(loss, held)
            if clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(held, clip_norm)
            optimiser.step()
            after_step()
            step += 1
            correct = (logits.detach().argmax(1) == labels).sum()
            row = torch.stack([loss.detach().double() * len(labels), correct.double(), correct.new_tensor(len(labels)).double()])
            sums += row if together is None else row * together.counts
            stopped = stop_step(step) or step == max_steps
            if stopped:
                break
        if together is not None:
            torch.distributed.all_reduce(sums)
        total, correct, seen = sums.tolist()
        if not math.isfinite(total):
            raise NonFinite(step)
        history.append(Epoch(epoch=epoch, step=step, loss=total / seen, accuracy=correct / seen,
                             learning_rate=optimiser.param_groups[0]["lr"], gradient_norm=float(norm)))
        on_epoch(history[-1])
        if stopped or stop_epoch(history[-1]):
            break
    return history


def steps_per_epoch(images: int, batch_size: int) -> int:
    return math.ceil(images / batch_size)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, precision: Precision = "fp32") -> Logits:
    """Logits of all `images` (uint8 or floats, [n, c, h, w]) on the CPU, in eval mode; `model` is left as it was."""
    device, modes = device_of(model), [(module, module.training) for module in model.modules()]
    model.eval()
    logits = []
    for part in images.split(EVAL_BATCH):
        part = part.to(device)
        part = to_floats(part) if part.dtype == torch.uint8 else part
        with autocast(precision, device):
            logits.append(model(part.contiguous(memory_format=torch.channels_last)).float().cpu())
    for module, training in modes:  # one by one: frozen BatchNorm stays frozen
        module.training = training
    return torch.cat(logits)


def accuracy(model: nn.Module, data: ImageSet, *, precision: Precision = "fp32") -> float:
    return (predict(model, data.images, precision=precision).argmax(1) == data.labels).float().mean().item()


@dataclass(frozen=True, kw_only=True)
class Train:
    """How a classifier is trained, benign or backdoored: SGD with Nesterov momentum on a one-cycle schedule."""

    epochs: Annotated[int, "passes over the training set"] = 12
    batch_size: Annotated[int, "images per step"] = 128
    lr: Annotated[float, "peak learning rate"] = 0.1
    momentum: Annotated[float, "SGD momentum"] = 0.9
    weight_decay: Annotated[float, "SGD weight decay"] = 5e-4
    warm_up: Annotated[float, "share of the run in which the learning rate rises"] = 0.25
    label_smoothing: Annotated[float, "share of each label spread over all classes"] = 0.0
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = "auto"
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warm_up < 1:
            raise UserError(f"train.warm_up must be in [0, 1), got {self.warm_up}")

    def __call__(self, model: nn.Module, data: ImageSet, *, rng: torch.Generator, on_epoch: OnEpoch = ignore) -> nn.Module:
        """Train `model` in place and return it in eval mode; under torchrun all processes train one model."""
        optimiser = torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0,
                                    weight_decay=self.weight_decay)
        with team(model) as together:
            fit(model.train(), data, objective=cross_entropy(model, self.label_smoothing), optimiser=optimiser,
                epochs=self.epochs, batch_size=self.batch_size, rng=rng, augment=self.augment,
                schedule=lambda epoch: one_cycle(epoch / self.epochs, self.warm_up), precision=self.precision,
                on_epoch=on_epoch, together=together)
        return model.eval()


def cross_entropy(model: nn.Module, label_smoothing: float = 0.0) -> Objective:
    def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing), logits

    return objective


def one_cycle(done: float, warm_up: float) -> float:
    """Factor on the peak learning rate after the share `done` of a run: a straight rise, then a straight fall to 0."""
    return (0.04 + 0.96 * done / warm_up) if done < warm_up else (1 - done) / (1 - warm_up)


def multi_step(milestones: tuple[int, ...], gamma: float) -> Callable[[float], float]:
    """Factor on the learning rate: times `gamma` at each milestone, in epochs."""
    return lambda epoch: gamma ** sum(epoch >= milestone for milestone in milestones)
