"""Unlearn: maximize the error of a model on clean images, all weights free, until its accuracy has
fallen to a stop.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from rnp.errors import NonFiniteLossError
from rnp.neurons.masks import freeze_statistics
from rnp.params.ranges import Hyperparameters
from rnp.training.augment import Augment
from rnp.training.device import chosen_precision
from rnp.training.loop import fit, multi_step, steps_per_epoch
from rnp.training.predict import class_shares, predict
from rnp.types import Epoch, ImageSet, OnEpoch, no_callback

State = dict[str, Tensor]


@dataclass(frozen=True)
class Unlearned:
    """`model` is the network at the stop; `checkpoints` the weights where accuracy first fell to
    each level on the way.

    `trajectory` has one row per step: accuracy on the defense set in eval mode and, in `extra`,
    the share of predictions that fall on each class (`share/0` ...) among the images of the
    *other* classes. `reached` is false when the stop was never met; `model` is then the least
    accurate one seen. `accuracy` is that of `model`.
    """

    model: nn.Module
    checkpoints: dict[str, State]
    trajectory: list[Epoch]
    reached: bool
    stop_step: int
    accuracy: float
    retries: int


@dataclass(frozen=True, kw_only=True)
class Unlearn(Hyperparameters):
    """Gradient ascent on the cross-entropy of the defense set.

    Source: Li et al., ICML 2023, section 3 and Algorithm 1.
    Differs: the stop is checked after every step, in eval mode; a step that costs more than
    `largest_drop` of accuracy is taken back and the step size halved, so that one default serves
    small and large models; gradients are clipped after the backward pass, not before it. After the
    stop the ascent goes on to the collapse, for detection only. The `parity` settings (stop_metric
    running, stop .2, lr .01, no largest_drop, no clip) restore the published run.
    """

    optimizer: Annotated[
        Literal["sgd", "adam"], "adam with bn_mode frozen is the smooth variant"
    ] = "sgd"
    lr: Annotated[float, Gt(0), "learning rate of the ascent"] = 0.001
    momentum: Annotated[float, "SGD momentum"] = 0.9
    weight_decay: Annotated[
        float, Ge(0), "weight decay, which keeps shrinking the weights during the ascent"
    ] = 5e-4
    batch_size: Annotated[int, Gt(0), "images per step"] = 128
    epochs: Annotated[int, Gt(0), "passes over the defense set, at most"] = 60
    milestones: Annotated[
        tuple[int, ...], "epochs at which the learning rate is multiplied by gamma"
    ] = ()
    gamma: Annotated[float, Gt(0), "factor on the learning rate at each milestone"] = 0.1
    max_grad_norm: Annotated[float, Ge(0), "largest norm of a gradient; 0 does not clip"] = 20.0
    bn_mode: Annotated[
        Literal["train", "frozen"],
        "BatchNorm on batch statistics, or on its running ones, unchanged",
    ] = "train"
    stop_metric: Annotated[
        Literal["eval", "running"], "accuracy that stops: eval mode after each step, or the epoch's"
    ] = "eval"
    stop_accuracy: Annotated[
        float, Interval(gt=0, lt=1), "accuracy on the defense set at which to stop"
    ] = 0.5
    max_drop_per_step: Annotated[
        float,
        Ge(0),
        "accuracy that one step may cost; beyond it the step is redone at half size; 0 allows any",
    ] = 0.1
    until_collapse: Annotated[
        bool, "go on after the stop until one class takes all predictions, for detection"
    ] = True
    retries: Annotated[
        int, Ge(0), "restarts at a tenth of the learning rate after a non-finite loss"
    ] = 3
    augment: Augment = Augment()

    def __call__(
        self,
        model: nn.Module,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Unlearned:
        """Unlearn a copy of `model`. Drawn at random: the order and the augmentation of the images.

        Raises: NonFinite when the loss stays non-finite after all retries.
        """
        start, lr = rng.get_state(), self.lr
        for attempt in range(self.retries + 1):
            rng.set_state(start)
            ascent = _Ascent(self, copy.deepcopy(model), clean, on_epoch)
            try:
                ascent.run(lr, rng)
            except NonFiniteLossError:
                if attempt == self.retries:
                    raise
                lr /= 10
            else:
                return ascent.result(attempt)
        raise AssertionError("unreachable")


class _Ascent:
    """One run of the ascent, with the bookkeeping that `fit` does not know."""

    LEVELS = (0.8, 0.5, 0.2)

    def __init__(
        self, options: Unlearn, model: nn.Module, clean: ImageSet, on_epoch: OnEpoch
    ) -> None:
        self.options, self.model, self.clean, self.on_epoch = options, model, clean, on_epoch
        self.k = len(clean.classes)
        self.trajectory: list[Epoch] = []
        self.checkpoints: dict[str, State] = {}
        self.factor, self.stop_step, self.at_stop = 1.0, 0, None
        self.accuracy = self._measure()[0]
        self.least = (self.accuracy, 0, self._state())
        self.kept: tuple[State, dict] | None = None
        self.last_loss = 0.0

    def run(self, lr: float, rng: torch.Generator) -> None:
        o = self.options
        freeze_statistics(self.model, o.bn_mode == "frozen")
        parameters = self.model.parameters()
        if o.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(
                parameters, lr=lr, momentum=o.momentum, weight_decay=o.weight_decay
            )
        else:
            self.optimizer = torch.optim.Adam(parameters, lr=lr, weight_decay=o.weight_decay)
        decay = multi_step(o.milestones, o.gamma)
        self._snapshot()
        fit(
            self.model,
            self.clean,
            objective=self._objective,
            optimizer=self.optimizer,
            epochs=o.epochs,
            batch_size=o.batch_size,
            rng=rng,
            augment=o.augment,
            max_grad_norm=o.max_grad_norm or None,
            precision=chosen_precision(),
            schedule=lambda epoch: self.factor * decay(epoch),
            stop_step=self._after_step,
            stop_epoch=self._after_epoch,
        )

    def _objective(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        loss = -F.cross_entropy(logits.float(), labels)
        self.last_loss = loss.detach()
        return loss, logits

    def _measure(self, step: int = 0) -> tuple[float, list[float]]:
        """Accuracy, and for each class its share of the predictions for images of the other
        classes.
        """
        logits = predict(self.model, self.clean.images, precision=chosen_precision())
        if (
            not logits.isfinite().all()
        ):  # a step can overflow before any loss shows it, and NaN counts as class 0
            raise NonFiniteLossError(step)
        predicted = logits.argmax(1)
        accuracy = (predicted == self.clean.labels).float().mean().item()
        return accuracy, class_shares(predicted, self.clean.labels, self.k).tolist()

    def _snapshot(self) -> None:
        self.kept = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def _after_step(self, step: int) -> bool:
        """Measure, take the step back when it fell too far, record, and say whether the ascent is
        over.
        """
        loss = float(self.last_loss)
        if not math.isfinite(loss):
            raise NonFiniteLossError(step)
        o = self.options
        accuracy, shares = self._measure(step)
        if (
            o.max_drop_per_step
            and self.accuracy - accuracy > o.max_drop_per_step
            and self.factor > 1e-3
        ):
            self.model.load_state_dict(self.kept[0])
            self.optimizer.load_state_dict(
                copy.deepcopy(self.kept[1])
            )  # it would go on to change the kept momenta
            self.factor /= 2
            return False
        self.accuracy = accuracy
        if o.max_drop_per_step:
            self._snapshot()
        row = Epoch(
            epoch=(step - 1) // steps_per_epoch(len(self.clean), o.batch_size),
            step=step,
            loss=loss,
            accuracy=accuracy,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            gradient_norm=0.0,
            extra={f"share/{c}": share for c, share in enumerate(shares)},
        )
        self.trajectory.append(row)
        self.on_epoch(row)
        for level in self.LEVELS:
            if accuracy <= level and f"{level:.1f}" not in self.checkpoints:
                self.checkpoints[f"{level:.1f}"] = self._state()
        if self.at_stop is None and accuracy < self.least[0]:
            self.least = (accuracy, step, self._state())
        if o.stop_metric == "eval" and self.at_stop is None and accuracy <= o.stop_accuracy:
            self._mark_stop(step)
        collapsed = max(shares) >= 0.95 or accuracy <= 1.2 / self.k
        return self.at_stop is not None and (collapsed or not o.until_collapse)

    def _after_epoch(self, epoch: Epoch) -> bool:
        if (
            self.options.stop_metric == "running"
            and self.at_stop is None
            and epoch.accuracy <= self.options.stop_accuracy
        ):
            self._mark_stop(epoch.step)
        return self.at_stop is not None and not self.options.until_collapse

    def _mark_stop(self, step: int) -> None:
        self.stop_step, self.at_stop = step, (self.accuracy, self._state())

    def _state(self) -> State:
        return copy.deepcopy(self.model.state_dict())

    def result(self, retries: int) -> Unlearned:
        reached = self.at_stop is not None
        self.checkpoints["end"] = self._state()
        step = self.stop_step if reached else self.least[1]
        accuracy, state = self.at_stop if reached else (self.least[0], self.least[2])
        self.model.load_state_dict(state)
        return Unlearned(
            self.model.eval(), self.checkpoints, self.trajectory, reached, step, accuracy, retries
        )
