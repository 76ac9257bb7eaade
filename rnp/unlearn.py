"""Unlearn: maximize the error of a model on clean images, until its accuracy is low enough."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

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
LEVELS = (0.8, 0.5, 0.2)
"""Accuracies at which checkpoints are kept."""


@dataclass(frozen=True)
class Unlearned:
    """`model` is the network at the stop.

    `checkpoints` are the weights where the accuracy first reached each of `LEVELS`, and at the
    end. `trajectory` has one row per step: accuracy on the defense set in eval mode and, in
    `extra`, the share of predictions of each class (`share/0`, ...) among the images of the
    *other* classes. If the stop was never met, `reached` is false and `model` is the least
    accurate one. `accuracy` is that of `model`.
    """

    model: nn.Module
    checkpoints: dict[str, State]
    trajectory: list[Epoch]
    reached: bool
    stop_step: int
    accuracy: float
    retries: int

    def metrics(self) -> dict[str, Any]:
        """The numbers of a report; there must be at least one step."""
        last = self.trajectory[-1]
        return {
            "reached": self.reached,
            "stop_step": self.stop_step,
            "accuracy": self.accuracy,
            "learning_rate": last.learning_rate,
            "retries": self.retries,
            "steps": last.step,
            "end_accuracy": last.accuracy,
            "end_top_share": max(last.extra.values()),
        }


@dataclass(frozen=True, kw_only=True)
class Unlearn(Hyperparameters):
    """Gradient ascent on the cross-entropy of the defense set.

    Source: Li et al., ICML 2023, section 3 and Algorithm 1.
    Differs: the stop is checked after every step, in eval mode. The step size adapts, so that one
    default serves small and large models and those that others trained: it grows by `growth` after
    a step that costs less than `free_drop` of accuracy, and a step that costs more than
    `max_drop_per_step` is undone and the step size halved. Gradients are clipped after the backward
    pass, not before it. With `until_collapse` the ascent goes on after the stop, for detection
    only. The published run is restored by `stop_metric="running", stop_accuracy=0.2, lr=0.01,
    milestones=(10, 20), epochs=21, max_drop_per_step=0, max_grad_norm=0,
    until_collapse=False`.
    """

    optimizer: Annotated[
        Literal["sgd", "adam"], "adam with bn_mode frozen gives a smoother ascent"
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
        "train: BatchNorm uses batch statistics; frozen: its running statistics, unchanged",
    ] = "train"
    stop_metric: Annotated[
        Literal["eval", "running"],
        "accuracy for the stop: in eval mode after each step, or that of the epoch's batches",
    ] = "eval"
    stop_accuracy: Annotated[
        float, Interval(gt=0, lt=1), "accuracy on the defense set at which to stop"
    ] = 0.5
    max_drop_per_step: Annotated[
        float,
        Ge(0),
        "accuracy that one step may cost, else it is undone and the step halved; 0 allows any",
    ] = 0.1
    growth: Annotated[
        float, Ge(1), "factor on the step size after a step that costs almost nothing; 1 keeps it"
    ] = 1.0
    free_drop: Annotated[
        float, Ge(0), "accuracy that a step may cost and still count as almost nothing"
    ] = 0.01
    until_collapse: Annotated[
        bool, "continue after the stop until one class gets all predictions, for detection"
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
        """Unlearn a copy of `model`.

        Drawn at random: the order and the augmentation of the images.

        Raises: NonFiniteLossError when the loss stays non-finite after all retries.
        """
        start = rng.get_state()
        lr = self.lr
        for attempt in range(self.retries + 1):
            rng.set_state(start)
            ascent = _Ascent(self, copy.deepcopy(model), clean, lr, on_epoch)
            try:
                ascent.run(rng)
            except NonFiniteLossError:
                if attempt == self.retries:
                    raise
                lr /= 10
            else:
                return ascent.result(attempt)
        raise AssertionError("unreachable")


GROWING = Unlearn(growth=1.2)
"""For networks of unknown training, on which the default step may be far too small."""


@dataclass(frozen=True)
class _Snapshot:
    """The weights of a model at a step, and its accuracy there."""

    step: int
    accuracy: float
    state: State


class _Ascent:
    """One run of the ascent: measures each step, undoes it if necessary, and finds the stop."""

    def __init__(
        self,
        options: Unlearn,
        model: nn.Module,
        clean: ImageSet,
        lr: float,
        on_epoch: OnEpoch,
    ) -> None:
        self.options = options
        self.model = model
        self.clean = clean
        self.on_epoch = on_epoch
        self.num_classes = len(clean.classes)
        self.trajectory: list[Epoch] = []
        self.checkpoints: dict[str, State] = {}
        self.step_factor = 1.0
        self.last_loss = torch.zeros(())
        self.accuracy, _ = self._measure(0)
        self.least = self._snapshot(0)
        self.stop: _Snapshot | None = None
        freeze_statistics(model, options.bn_mode == "frozen")
        self.optimizer = self._make_optimizer(lr)
        self.undo_point = self._training_state()

    def run(self, rng: torch.Generator) -> None:
        options = self.options
        decay = multi_step(options.milestones, options.gamma)
        fit(
            self.model,
            self.clean,
            objective=self._objective,
            optimizer=self.optimizer,
            epochs=options.epochs,
            batch_size=options.batch_size,
            rng=rng,
            augment=options.augment,
            max_grad_norm=options.max_grad_norm or None,
            precision=chosen_precision(),
            schedule=lambda epoch: self.step_factor * decay(epoch),
            stop_step=self._after_step,
            stop_epoch=self._after_epoch,
        )

    def result(self, retries: int) -> Unlearned:
        self.checkpoints["end"] = self._state()
        chosen = self.stop or self.least
        self.model.load_state_dict(chosen.state)
        return Unlearned(
            model=self.model.eval(),
            checkpoints=self.checkpoints,
            trajectory=self.trajectory,
            reached=self.stop is not None,
            stop_step=chosen.step,
            accuracy=chosen.accuracy,
            retries=retries,
        )

    def _make_optimizer(self, lr: float) -> torch.optim.Optimizer:
        options = self.options
        parameters = self.model.parameters()
        if options.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=lr, weight_decay=options.weight_decay)
        return torch.optim.SGD(
            parameters, lr=lr, momentum=options.momentum, weight_decay=options.weight_decay
        )

    def _objective(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        loss = -F.cross_entropy(logits.float(), labels)
        self.last_loss = loss.detach()
        return loss, logits

    def _after_step(self, step: int) -> bool:
        """Measure the step, undo or record it; returns whether the ascent is over."""
        loss = float(self.last_loss)
        if not math.isfinite(loss):
            raise NonFiniteLossError(step)
        accuracy, shares = self._measure(step)
        if self._drops_too_far(accuracy):
            self._undo_step()
            return False
        if self.accuracy - accuracy < self.options.free_drop:
            self.step_factor *= self.options.growth
        self.accuracy = accuracy
        if self.options.max_drop_per_step:
            self.undo_point = self._training_state()
        self._record(step, loss, shares)
        self._keep_checkpoints(step)
        if self.options.stop_metric == "eval" and accuracy <= self.options.stop_accuracy:
            self._mark_stop(step)
        collapsed = max(shares) >= 0.95 or accuracy <= 1.2 / self.num_classes
        return self.stop is not None and (collapsed or not self.options.until_collapse)

    def _after_epoch(self, epoch: Epoch) -> bool:
        """Stop by the accuracy of the batches; returns whether the ascent is over."""
        options = self.options
        if options.stop_metric == "running" and epoch.accuracy <= options.stop_accuracy:
            self._mark_stop(epoch.step)
        return self.stop is not None and not options.until_collapse

    def _measure(self, step: int) -> tuple[float, list[float]]:
        """Accuracy, and the share of each class among the predictions for other classes."""
        logits = predict(self.model, self.clean.images, precision=chosen_precision())
        # A step can overflow before any loss shows it, and argmax counts NaN as class 0.
        if not logits.isfinite().all():
            raise NonFiniteLossError(step)
        predicted = logits.argmax(1)
        accuracy = (predicted == self.clean.labels).float().mean().item()
        return accuracy, class_shares(predicted, self.clean.labels, self.num_classes).tolist()

    def _drops_too_far(self, accuracy: float) -> bool:
        limit = self.options.max_drop_per_step
        return limit > 0 and self.accuracy - accuracy > limit and self.step_factor > 1e-3

    def _undo_step(self) -> None:
        """Return to the last undo point, and halve the step size."""
        weights, moments = self.undo_point
        self.model.load_state_dict(weights)
        # A copy, since the optimizer would change the moments of the undo point in place.
        self.optimizer.load_state_dict(copy.deepcopy(moments))
        self.step_factor /= 2

    def _record(self, step: int, loss: float, shares: list[float]) -> None:
        row = Epoch(
            epoch=(step - 1) // steps_per_epoch(len(self.clean), self.options.batch_size),
            step=step,
            loss=loss,
            accuracy=self.accuracy,
            learning_rate=self.optimizer.param_groups[0]["lr"],
            gradient_norm=0.0,
            extra={f"share/{c}": share for c, share in enumerate(shares)},
        )
        self.trajectory.append(row)
        self.on_epoch(row)

    def _keep_checkpoints(self, step: int) -> None:
        """Keep the weights if a level is reached for the first time, or the lowest accuracy."""
        for level in LEVELS:
            name = f"{level:.1f}"
            if self.accuracy <= level and name not in self.checkpoints:
                self.checkpoints[name] = self._state()
        if self.stop is None and self.accuracy < self.least.accuracy:
            self.least = self._snapshot(step)

    def _mark_stop(self, step: int) -> None:
        """Remember the first step at which the stop is met."""
        if self.stop is None:
            self.stop = self._snapshot(step)

    def _snapshot(self, step: int) -> _Snapshot:
        return _Snapshot(step, self.accuracy, self._state())

    def _state(self) -> State:
        return copy.deepcopy(self.model.state_dict())

    def _training_state(self) -> tuple[State, dict]:
        """The state of the model and of the optimizer."""
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))
