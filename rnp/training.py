"""The one training loop. Unlearning, masks and distillation differ by objective, optimiser,
`after_step` and stop rule.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rnp.augment import Augment, shrink
from rnp.errors import NonFinite, UserError
from rnp.graphs import Replayed
from rnp.models.classifier import evaluating
from rnp.models.parallel import Team, processes, team
from rnp.types import (
    Epoch,
    Images,
    ImageSet,
    Indices,
    Labels,
    Logits,
    OnEpoch,
    ignore,
    send,
    to_floats,
)

Objective = Callable[[Images, Labels], tuple[Tensor, Logits]]
"""Batch -> the scalar to minimise, and the logits by which accuracy is counted."""
OnBatch = Callable[[Indices, Labels, Logits], None]
"""Hears of each step: positions of its images in the set, their labels, and the logits before the
step.
"""
Precision = Literal["fp32", "bf16", "auto"]
WORTH_COMPILING = (
    10_000  # steps; only then does a GPU save more than compiling takes (results/cifar10/steps.csv)
)
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
FORGONE = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""What a limit may say that leaves oneDNN no native product of bf16."""
EVAL_BATCH = 500
EVAL_VALUES = (
    2**23
)  # of images in one forward pass; the activations of its first layer are many times that


def default_device() -> torch.device:
    """`RNP_DEVICE`, else a GPU when there is one (under torchrun one for each process), else the
    CPU.

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
    """Whether to compute in bf16; `auto` does where the hardware multiplies it natively, and
    oneDNN has not been told to forgo that.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() and not FORGONE & {
        os.environ.get(name, "").upper() for name in LIMITS
    }


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    on = half_precision(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16) if on else contextlib.nullcontext()


def seeded(function: Callable) -> Callable:
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


@seeded
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
    side: Callable[[float], float] = lambda epoch: 1.0,
    clip_norm: float | None = None,
    max_steps: int | None = None,
    precision: Precision = "fp32",
    after_step: Callable[[], None] = lambda: None,
    stop_step: Callable[[int], bool] = lambda step: False,
    stop_epoch: Callable[[Epoch], bool] = lambda epoch: False,
    on_epoch: OnEpoch = ignore,
    on_batch: OnBatch = lambda positions, labels, logits: None,
    together: Team | None = None,
    graphed: bool = False,
) -> list[Epoch]:
    """Minimise `objective` over shuffled batches of `data`, changing in place whatever `optimiser`
    holds.

    `schedule` maps the epochs done so far, a fraction, to a factor on the learning rate, `side` to
    one on the side of the images; `after_step` runs after every step; `stop_step`, given the
    number of steps done, and `stop_epoch` end the run when true. The mode of `model` (train or
    eval) is the caller's. Drawn at random from `rng`: the order of the images and their
    augmentation; by each process of `together` alike, which then takes its slice of the batch.

    `graphed`, a GPU repeats recorded steps without Python, compiled ones where the run is long;
    the optimiser must come from `graphable`, and `objective`, `after_step` and `model` must
    neither ask for values nor decide by them.

    Raises: NonFinite after an epoch whose loss was NaN or infinite; UserError when BatchNorm is
    given a single value.
    """
    device, per_epoch = device_of(model), steps_per_epoch(len(data), batch_size)
    data = resident(data, device)
    initial = [float(group["lr"]) for group in optimiser.param_groups]
    held = [p for group in optimiser.param_groups for p in group["params"]]

    def update(
        objective: Objective, images: Images, labels: Labels
    ) -> tuple[Tensor, Logits, Tensor]:
        with autocast(precision, device), one_value_explained(len(data), batch_size):
            loss, logits = objective(images, labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward() if together is None else together.backward(loss, held)
        norm = (
            loss.new_zeros(()) if clip_norm is None else nn.utils.clip_grad_norm_(held, clip_norm)
        )
        optimiser.step()
        after_step()
        return loss.detach(), logits.detach(), norm

    advance = functools.partial(update, objective)
    if graphed and device.type == "cuda" and together is None:
        long = epochs * per_epoch >= WORTH_COMPILING
        quick = (
            functools.partial(update, torch.compile(objective, dynamic=False)) if long else advance
        )
        advance = Replayed(quick, advance, (batch_size, *data.shape))
    history, step, stopped = [], 0, False
    for epoch in range(epochs):
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        for positions in (
            torch.randperm(len(data), generator=rng).to(data.labels.device).split(batch_size)
        ):
            for group, lr in zip(optimiser.param_groups, initial):
                set_lr(group, lr * schedule(step / per_epoch))
            images, labels = batch_of(data, positions, augment, side(step / per_epoch), device, rng)
            own, truth = (images, labels) if together is None else together.take(images, labels)
            loss, logits, norm = advance(own, truth)
            on_batch(
                positions,
                labels,
                logits if together is None else together.whole(logits, len(labels)),
            )
            step += 1
            row = tally(loss, logits, truth)
            sums += row if together is None else row * together.counts
            stopped = stop_step(step) or step == max_steps
            if stopped:
                break
        if together is not None:
            torch.distributed.all_reduce(sums)
        total, correct, seen = sums.tolist()
        if not math.isfinite(total):
            raise NonFinite(step)
        history.append(
            Epoch(
                epoch=epoch,
                step=step,
                loss=total / seen,
                accuracy=correct / seen,
                learning_rate=float(optimiser.param_groups[0]["lr"]),
                gradient_norm=float(norm),
            )
        )
        on_epoch(history[-1])
        if stopped or stop_epoch(history[-1]):
            break
    return history


def resident(data: ImageSet, device: torch.device) -> ImageSet:
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
    return shrink(augment(to_floats(send(images, device)), rng=rng), side), send(
        data.labels[positions], device
    )


def set_lr(group: dict, lr: float) -> None:
    """A tensor stays the same one, for a recorded step reads it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr


def graphable(
    kind: type[torch.optim.Optimizer], model: nn.Module, *, lr: float, **options: object
) -> torch.optim.Optimizer:
    """An optimiser of all weights of `model`; on a GPU one whose steps can be recorded, in one
    kernel.
    """
    device = device_of(model)
    if device.type == "cuda":
        options |= {"fused": True} | ({} if kind is torch.optim.SGD else {"capturable": True})
        lr = torch.tensor(lr, device=device)
    return kind(model.parameters(), lr=lr, **options)


@contextlib.contextmanager
def one_value_explained(images: int, batch_size: int) -> Iterator[None]:
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


def tally(loss: Tensor, logits: Logits, labels: Labels) -> Float[Tensor, "3"]:
    """Sum of the losses, images classified right, images; on the device, for nothing waits for it
    there.
    """
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack(
        [loss.double() * len(labels), correct.double(), correct.new_tensor(len(labels)).double()]
    )


def steps_per_epoch(images: int, batch_size: int) -> int:
    return math.ceil(images / batch_size)


def eval_batches(images: Tensor) -> tuple[Tensor, ...]:
    """Parts for one forward pass each: `EVAL_BATCH` images, fewer of large ones."""
    return images.split(max(1, min(EVAL_BATCH, EVAL_VALUES // max(1, images[:1].numel()))))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, precision: Precision = "fp32") -> Logits:
    """Logits of all `images` (uint8 or floats, [n, c, h, w]) on the CPU, in eval mode; `model` is
    left as it was.

    Raises: UserError when the model answers with anything but logits.
    """
    device, logits = device_of(model), []
    with evaluating(model), autocast(precision, device):
        for part in eval_batches(images):
            part = part.to(device)
            part = to_floats(part) if part.dtype == torch.uint8 else part
            logits.append(checked(model(part), len(part)).float().cpu())
    return torch.cat(logits)


def checked(answer: object, n: int) -> Tensor:
    """Raises: UserError when a model's answer for `n` images is no [n, k]."""
    if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != n:
        shape = (
            f"tensor of shape {list(answer.shape)}"
            if isinstance(answer, Tensor)
            else type(answer).__name__
        )
        raise UserError(
            f"the model answers {n} images with a {shape}, not with logits of shape [{n}, classes];"
            " rnp repairs classifiers with one head"
        )
    return answer


def accuracy(model: nn.Module, data: ImageSet, *, precision: Precision = "fp32") -> float:
    return (
        (predict(model, data.images, precision=precision).argmax(1) == data.labels)
        .float()
        .mean()
        .item()
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """How a classifier is trained, benign or backdoored: SGD with Nesterov momentum, or AdamW, on
    a one-cycle schedule.
    """

    optimiser: Annotated[
        Literal["sgd", "adamw"], "adamw serves transformers, with a learning rate near .001"
    ] = "sgd"
    epochs: Annotated[int, "passes over the training set"] = 12
    batch_size: Annotated[int, "images per step"] = 128
    lr: Annotated[float, "peak learning rate"] = 0.1
    momentum: Annotated[float, "SGD momentum"] = 0.9
    weight_decay: Annotated[float, "weight decay"] = 5e-4
    warm_up: Annotated[float, "share of the run in which the learning rate rises"] = 0.25
    label_smoothing: Annotated[float, "share of each label spread over all classes"] = 0.0
    grow_from: Annotated[
        float,
        "side of the images at the start, as a share of their own; below 1 the run takes less time",
    ] = 1.0
    grow_until: Annotated[float, "share of the run after which they have their own side"] = 0.7
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = (
        "auto"
    )
    augment: Augment = field(default_factory=Augment)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"train.{name} must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warm_up < 1:
            raise UserError(f"train.warm_up must be in [0, 1), got {self.warm_up}")
        if not 0 < self.grow_from <= 1:
            raise UserError(f"train.grow_from must be in (0, 1], got {self.grow_from}")
        if not 0 <= self.grow_until < 1:
            raise UserError(
                f"train.grow_until must be in [0, 1), got {self.grow_until}; the end of a run needs"
                " whole images"
            )

    def __call__(
        self,
        model: nn.Module,
        data: ImageSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
        on_batch: OnBatch = lambda positions, labels, logits: None,
    ) -> nn.Module:
        """Train `model` in place and return it in eval mode; under torchrun all processes train
        one model.
        """
        if self.optimiser == "adamw":
            optimiser = graphable(
                torch.optim.AdamW, model, lr=self.lr, weight_decay=self.weight_decay
            )
        else:
            optimiser = graphable(
                torch.optim.SGD,
                model,
                lr=self.lr,
                momentum=self.momentum,
                nesterov=self.momentum > 0,
                weight_decay=self.weight_decay,
            )
        with team(model) as together:
            fit(
                model.train(),
                data,
                objective=cross_entropy(model, self.label_smoothing),
                optimiser=optimiser,
                epochs=self.epochs,
                batch_size=self.batch_size,
                rng=rng,
                augment=self.augment,
                schedule=lambda epoch: one_cycle(epoch / self.epochs, self.warm_up),
                side=lambda epoch: growing(epoch / self.epochs, self.grow_from, self.grow_until),
                precision=self.precision,
                on_epoch=on_epoch,
                on_batch=on_batch,
                together=together,
                graphed=True,
            )
        return model.eval()


def cross_entropy(model: nn.Module, label_smoothing: float = 0.0) -> Objective:
    def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(images)
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing), logits

    return objective


def one_cycle(done: float, warm_up: float) -> float:
    """Factor on the peak learning rate after the share `done` of a run: a straight rise, then a
    straight fall to 0.
    """
    return (0.04 + 0.96 * done / warm_up) if done < warm_up else (1 - done) / (1 - warm_up)


def growing(done: float, start: float, until: float) -> float:
    """Factor on the side of the images after the share `done` of a run: a straight rise from
    `start` to 1 at `until`.
    """
    return start + (1 - start) * done / until if done < until else 1.0


def multi_step(milestones: tuple[int, ...], gamma: float) -> Callable[[float], float]:
    """Factor on the learning rate: times `gamma` at each milestone, in epochs."""
    return lambda epoch: gamma ** sum(epoch >= milestone for milestone in milestones)
