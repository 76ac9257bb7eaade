"""Unlearning: equals the published loop with its settings; stops, undoes steps and restarts."""

import copy
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from batches import batches
from torch import nn

from benchmarks.reference_rnp import ascent
from rnp.errors import NonFiniteLossError, UserError
from rnp.training.augment import Augment
from rnp.training.device import use_precision
from rnp.training.predict import accuracy, predict
from rnp.unlearn import Unlearn

PLAIN = Augment(crop=0, flip=False)
PUBLISHED = Unlearn(
    stop_metric="running",
    stop_accuracy=0.3,
    lr=0.01,
    max_drop_per_step=0,
    max_grad_norm=0,
    milestones=(10, 20),
    epochs=21,
    until_collapse=False,
    batch_size=8,
    augment=PLAIN,
)
# From an accuracy of 1.0 to the collapse in about forty steps.
GENTLE = Unlearn(lr=0.03, batch_size=8, augment=PLAIN)


def published(model: nn.Module, data, rng, *, lr: float) -> tuple[nn.Module, int]:
    """The published ascent, with a stop at 0.3: it has 0.2 for ten classes, the toy has four."""
    steps = ascent(model, lambda: batches(data, 8, rng), lr=lr)
    for epoch, (unlearned, running) in enumerate(steps, 1):
        if running <= 0.3:
            return unlearned, epoch
    return unlearned, epoch


def has_weights(model: nn.Module, state: dict) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("seed", [0, 1])
def test_parity_with_the_published_loop(seed, trained, toy_set, rng):
    data = toy_set(60)
    theirs, epochs = published(trained, data, rng(seed), lr=0.01)
    ours = PUBLISHED(trained, data, rng=rng(seed))
    assert ours.reached and 1 < epochs < 21 and ours.stop_step == epochs * 8
    assert has_weights(theirs, ours.model.state_dict())


def test_parity_through_both_milestones(trained, toy_set, rng):
    """Too slow to reach the stop: all 21 epochs, three step sizes."""
    data = toy_set(20)
    theirs, epochs = published(trained, data, rng(), lr=1e-4)
    ours = Unlearn(**vars(PUBLISHED) | {"lr": 1e-4})(trained, data, rng=rng())
    assert not ours.reached and epochs == 21 and has_weights(theirs, ours.checkpoints["end"])
    assert {f"{row.learning_rate:.0e}" for row in ours.trajectory} == {"1e-04", "1e-05", "1e-06"}


def careful_ascent(
    model: nn.Module, data, rng, *, lr: float, max_drop_per_step: float, steps: int
) -> tuple[nn.Module, list[float], int]:
    """Undo each step that costs too much, with deep copies of everything, and halve the step."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    before = accuracy(model, data)
    accuracies = []
    factor = 1.0
    undone = 0
    for _ in range(100):
        for images, labels in batches(data, 8, rng):
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            optimizer.param_groups[0]["lr"] = lr * factor
            optimizer.zero_grad()
            (-F.cross_entropy(model(images), labels)).backward()
            optimizer.step()
            after = accuracy(model, data)
            if before - after > max_drop_per_step and factor > 1e-3:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(copy.deepcopy(saved[1]))
                factor /= 2
                undone += 1
            else:
                accuracies.append(after)
                before = after
            steps -= 1
            if not steps:
                return model, accuracies, undone
    raise AssertionError("more steps than expected")


@pytest.mark.parametrize("lr, seed", [(0.3, 0), (1.0, 0), (1.0, 3)])
def test_a_step_that_costs_too_much_is_undone(lr, seed, trained, toy_set, rng):
    data = toy_set(60)
    options = Unlearn(
        lr=lr,
        batch_size=8,
        augment=PLAIN,
        max_grad_norm=0,
        max_drop_per_step=0.1,
        stop_accuracy=0.3,
        until_collapse=False,
        epochs=5,
    )
    ours = options(trained, data, rng=rng(seed))
    steps = ours.stop_step if ours.reached else 5 * 8
    theirs, accuracies, undone = careful_ascent(
        trained, data, rng(seed), lr=lr, max_drop_per_step=0.1, steps=steps
    )
    assert undone > 1 and [row.accuracy for row in ours.trajectory] == accuracies
    assert len(accuracies) + undone == steps
    assert has_weights(theirs, ours.model.state_dict() if ours.reached else ours.checkpoints["end"])


def test_no_step_costs_more_than_allowed(trained, toy_set, rng):
    data = toy_set(80)

    def largest_drop(max_drop_per_step):
        options = Unlearn(**vars(GENTLE) | {"lr": 0.1, "max_drop_per_step": max_drop_per_step})
        rows = options(trained, data, rng=rng()).trajectory
        accuracies = [accuracy(trained, data), *(row.accuracy for row in rows)]
        return max(before - after for before, after in itertools.pairwise(accuracies))

    assert largest_drop(0.1) <= 0.1 + 1e-6 and largest_drop(0) > 0.2


def test_it_stops_at_the_first_step_at_the_stop(trained, toy_set, rng, unchanged):
    data = toy_set(60)
    rows = []
    result = GENTLE(unchanged(trained), data, rng=rng(), on_epoch=rows.append)
    before = [row for row in result.trajectory if row.step < result.stop_step]
    at = next(row for row in result.trajectory if row.step == result.stop_step)
    assert result.reached and not result.model.training and result.retries == 0
    assert before and all(row.accuracy > 0.5 for row in before) and at.accuracy <= 0.5
    assert accuracy(result.model, data) == at.accuracy and rows == result.trajectory


def test_the_trajectory_counts_steps_and_epochs(trained, toy_set, rng):
    """60 images in batches of 8: eight steps per epoch."""
    options = Unlearn(**vars(GENTLE) | {"lr": 1e-4, "epochs": 3, "max_drop_per_step": 0})
    rows = options(trained, toy_set(60), rng=rng()).trajectory
    assert [row.step for row in rows] == list(range(1, 25))
    assert [row.epoch for row in rows] == [0] * 8 + [1] * 8 + [2] * 8


def test_checkpoints_by_level(trained, toy_set, rng):
    data = toy_set(60)
    result = GENTLE(trained, data, rng=rng())
    lowest = min(row.accuracy for row in result.trajectory)
    reached = [level for level in (0.8, 0.5, 0.2) if lowest <= level]
    assert list(result.checkpoints) == [f"{level:.1f}" for level in reached] + ["end"]
    assert len(reached) >= 2
    model = copy.deepcopy(trained)
    for level in reached:
        model.load_state_dict(result.checkpoints[f"{level:.1f}"])
        assert accuracy(model, data) == next(
            row.accuracy for row in result.trajectory if row.accuracy <= level
        )


def test_it_goes_on_to_the_collapse(trained, toy_set, rng):
    data = toy_set(60)
    result = GENTLE(trained, data, rng=rng())
    last = result.trajectory[-1]
    model = copy.deepcopy(trained)
    model.load_state_dict(result.checkpoints["end"])
    predicted = predict(model, data.images).argmax(1)
    shares = [(predicted[data.labels != c] == c).float().mean().item() for c in range(4)]
    assert [last.extra[f"share/{c}"] for c in range(4)] == shares
    assert last.step > result.stop_step and (max(shares) >= 0.95 or last.accuracy <= 0.3)
    assert all(
        max(row.extra.values()) < 0.95 and row.accuracy > 0.3 for row in result.trajectory[:-1]
    )


@pytest.mark.parametrize("metric", ["eval", "running"])
def test_without_the_stop_the_least_accurate_model_is_returned(metric, trained, toy_set, rng):
    data = toy_set(60)
    result = Unlearn(**vars(GENTLE) | {"epochs": 2, "stop_accuracy": 0.01, "stop_metric": metric})(
        trained, data, rng=rng()
    )
    least = min([accuracy(trained, data), *(row.accuracy for row in result.trajectory)])
    assert not result.reached and accuracy(result.model, data) == least < accuracy(trained, data)
    assert result.stop_step == next(row.step for row in result.trajectory if row.accuracy == least)


def test_a_run_whose_steps_are_all_undone_returns_the_original(trained, toy_set, rng):
    result = Unlearn(lr=10.0, batch_size=64, epochs=1, max_grad_norm=0, augment=PLAIN)(
        trained, toy_set(60), rng=rng()
    )
    assert (
        not result.reached
        and result.trajectory == []
        and result.stop_step == 0
        and has_weights(trained, result.model.state_dict())
    )


@pytest.mark.parametrize("bn_mode", ["train", "frozen"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_statistics_stay(bn_mode, optimizer, trained, toy_set, rng):
    result = Unlearn(**vars(GENTLE) | {"bn_mode": bn_mode, "optimizer": optimizer})(
        trained, toy_set(60), rng=rng()
    )
    assert torch.equal(result.model.bn1.running_mean, trained.bn1.running_mean) == (
        bn_mode == "frozen"
    )
    assert (
        not torch.equal(result.model.bn1.weight, trained.bn1.weight) and len(result.trajectory) > 1
    )


def test_the_generator_decides(trained, toy_set, rng):
    data = toy_set(60)
    options = Unlearn(**vars(GENTLE) | {"augment": Augment(crop=1)})
    one, again, other = (options(trained, data, rng=rng(seed)) for seed in (1, 1, 2))
    assert one.trajectory == again.trajectory != other.trajectory and has_weights(
        one.model, again.model.state_dict()
    )


def test_bf16_unlearns_as_well(trained, toy_set, rng):
    data = toy_set(60)
    full = GENTLE(trained, data, rng=rng())
    with use_precision("bf16"):
        half = GENTLE(trained, data, rng=rng())
    assert (
        half.reached
        and abs(half.stop_step - full.stop_step) <= 5
        and half.trajectory != full.trajectory
    )
    assert half.model.fc.weight.dtype == torch.float32


def test_after_a_non_finite_loss_it_restarts_at_a_tenth(trained, toy_set, rng, monkeypatch):
    data = toy_set(60)
    calls = []

    def fails_twice(logits, labels):
        """NaN in the second step of two attempts."""
        calls.append(1)
        factor = float("nan") if len(calls) in (2, 4) else 1
        return F.cross_entropy(logits, labels) * factor

    strong = Unlearn(**vars(GENTLE) | {"lr": 1.0, "epochs": 2})
    gentle = Unlearn(**vars(strong) | {"lr": 1.0 / 10 / 10})(trained, data, rng=rng())
    monkeypatch.setattr("rnp.unlearn.F", types.SimpleNamespace(cross_entropy=fails_twice))
    result = strong(trained, data, rng=rng())
    assert (
        result.retries == 2
        and result.trajectory == gentle.trajectory
        and has_weights(gentle.model, result.model.state_dict())
    )


@pytest.mark.parametrize("max_drop_per_step", [0, 0.1])
def test_an_ascent_that_overflows_is_no_result(max_drop_per_step, trained, toy_set, rng):
    options = Unlearn(
        lr=1e20,
        max_drop_per_step=max_drop_per_step,
        max_grad_norm=0,
        retries=1,
        batch_size=8,
        augment=PLAIN,
    )
    with pytest.raises(NonFiniteLossError):
        options(trained, toy_set(60), rng=rng())


def test_the_clip_bounds_a_step(trained, toy_set, rng):
    result = Unlearn(
        lr=1.0,
        max_grad_norm=0.01,
        momentum=0,
        weight_decay=0,
        max_drop_per_step=0,
        epochs=1,
        batch_size=64,
        until_collapse=False,
        augment=PLAIN,
    )(trained, toy_set(60), rng=rng())
    vector = nn.utils.parameters_to_vector
    end = copy.deepcopy(trained)
    end.load_state_dict(result.checkpoints["end"])
    assert (vector(end.parameters()) - vector(trained.parameters())).norm().item() == pytest.approx(
        0.01, rel=1e-2
    )


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0},
        {"lr": float("nan")},
        {"weight_decay": -1},
        {"epochs": 0},
        {"batch_size": -1},
        {"gamma": 0},
        {"max_grad_norm": -1},
        {"max_drop_per_step": -1},
        {"retries": -1},
        {"stop_accuracy": 20},
        {"stop_accuracy": 0},
        {"stop_accuracy": 1},
    ],
)
def test_impossible_settings_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(UserError, match=rf"unlearn\.{name} must be .*got {value:g}"):
        Unlearn(**options)


def test_a_model_that_only_gets_better_is_returned_as_it_was(trained, toy_set, rng, monkeypatch):
    monkeypatch.setattr(
        "rnp.unlearn._Ascent._objective",
        lambda ascent, images, labels: descend(ascent, images, labels),
    )
    start = Unlearn(epochs=1, batch_size=20, stop_accuracy=0.01)
    result = start(trained, toy_set(40), rng=rng())
    assert (result.reached, result.stop_step) == (False, 0) and result.accuracy == 1.0
    assert all(
        torch.equal(value, trained.state_dict()[name])
        for name, value in result.model.state_dict().items()
    )


def descend(ascent, images, labels):
    logits = ascent.model(images)
    ascent.last_loss = torch.zeros(())
    return F.cross_entropy(logits, labels), logits


def test_the_step_grows_while_it_costs_nothing(trained, toy_set, rng):
    """By `growth` from one step to the next on the plateau, and no longer once accuracy falls."""
    options = Unlearn(**vars(GENTLE) | {"lr": 1e-3, "growth": 1.5, "max_drop_per_step": 0})
    rows = options(trained, toy_set(60), rng=rng()).trajectory
    before = accuracy(trained, toy_set(60))
    for row, after in itertools.pairwise(rows):
        costs_nothing = before - row.accuracy < options.free_drop
        factor = after.learning_rate / row.learning_rate
        assert factor == pytest.approx(1.5 if costs_nothing else 1.0)
        before = row.accuracy
    assert rows[-1].learning_rate > 10 * rows[0].learning_rate


def test_growth_reaches_the_stop_where_a_fixed_step_does_not(trained, toy_set, rng):
    data = toy_set(60)
    tiny = {"lr": 1e-4, "epochs": 10}
    assert not Unlearn(**vars(GENTLE) | tiny)(trained, data, rng=rng()).reached
    assert Unlearn(**vars(GENTLE) | tiny | {"growth": 1.2})(trained, data, rng=rng()).reached
