"""The choice of a point in a sweep, and the neurons that are pruned there."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rnp.errors import UserError
from rnp.neurons.masks import prune, rank_neurons, unit_mask
from rnp.prune import (
    Prune,
    SweepPoint,
    elbow,
    last_within_budget,
    logits_along_sweep,
    outlier_bound,
    prune_greedily,
    sorted_values,
    sweep,
    sweep_counts,
)
from rnp.training.predict import predict
from rnp.types import ImageSet


def points(lost=(), loss=(), threshold=(), changed=(), step=1) -> list[SweepPoint]:
    n = max(map(len, (lost, loss, threshold, changed)))

    def value(values, i):
        return values[i] if values else 0.0

    return [
        SweepPoint(
            pruned=i * step,
            threshold=value(threshold, i),
            accuracy=1 - value(lost, i),
            loss=value(loss, i),
            lost=value(lost, i),
            changed=value(changed, i),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "lost, chosen",
    [
        ([0, 0, 0.01, 0.02, 0.03], 3),
        ([0, 0.01, 0.05, 0.0, 0.0], 1),  # the first violation counts, though accuracy returns
        ([0, 0.03], 0),
        ([0, -0.01, 0.02, 0.02], 3),
        ([0], 0),
    ],
)
def test_last_within_budget(lost, chosen):
    assert last_within_budget(points(lost), 0.02).pruned == chosen
    assert last_within_budget(points(changed=lost), 0.02, "changed").pruned == chosen


@pytest.mark.parametrize(
    "rule, cost", [("accuracy_drop", "lost"), ("prediction_change", "changed")]
)
def test_a_sweep_ends_where_the_budget_is_exceeded(rule, cost):
    prune = Prune(rule=rule, max_accuracy_drop=0.02)
    decisive = [prune.is_decisive(point) for point in points(**{cost: [0, 0.02, 0.03, 0.0]})]
    assert decisive == [False, False, True, False]
    assert not any(map(Prune(rule="elbow").is_decisive, points(lost=[0, 0.5])))


@pytest.mark.parametrize(
    "loss, step, chosen",
    [
        ([1, 1, 1, 1, 2, 3, 4], 1, 3),
        ([1, 1, 1, 1, 2, 3, 4], 5, 15),
        ([0.0, 0.0, 0.0, 9.0], 1, 2),
        ([1, 2, 3, 4], 1, 0),  # a straight line has no elbow
        ([1], 1, 0),
        ([4, 3, 1, 1, 2, 4], 1, 2),  # the first of equals
    ],
)
def test_elbow(loss, step, chosen):
    assert elbow(points(loss=loss, step=step)).pruned == chosen


@pytest.mark.parametrize(
    "values, bound",
    [
        ([0.0, 1, 1, 1, 1], 1 - 3.5 * 0.01),  # most masks are 1: the floor
        ([0.2, 0.8, 0.9, 1.0, 0.9], 0.9 - 3.5 * 1.4826 * 0.1),
    ],
)
def test_outlier_bound(values, bound):
    assert outlier_bound(np.array(values)) == pytest.approx(bound)


@pytest.mark.parametrize("largest", [0, 1, 5, 32, 33, 100, 4800])
@pytest.mark.parametrize("extra", [(), (3, 47, 9999)])
def test_sweep_counts(largest, extra):
    counts = sweep_counts(largest, extra)
    assert counts == sorted(set(counts)) and counts[0] == 0 and counts[-1] == largest
    assert set(range(min(largest, 32) + 1)) | {e for e in extra if e <= largest} <= set(counts)
    assert all(b <= a + max(1, 0.0601 * a) for a, b in itertools.pairwise(counts))
    assert len(counts) < 130


@pytest.fixture
def mask(trained, rng):
    """Random values."""
    layers = unit_mask(trained)
    return {name: torch.rand(len(value), generator=rng()) for name, value in layers.items()}


@pytest.fixture
def val(toy_set):
    return toy_set(40, seed=7)


def test_the_sweep_by_hand(trained, mask, val):
    # With some wrong labels, so that some predictions become right.
    val = ImageSet(val.images, val.labels.where(torch.arange(40) % 3 > 0, 0), val.classes)
    order = rank_neurons(mask)
    rows = sweep(trained, order, sorted_values(order, mask), [0, 3, 6], val)
    right = {}
    for row in rows:
        logits = predict(prune(trained, order[: row.pruned]), val.images)
        right[row.pruned] = logits.argmax(1) == val.labels
        name, index = order[max(row.pruned - 1, 0)]
        assert row.threshold == (mask[name][index].item() if row.pruned else 0.0)
        assert row.accuracy == pytest.approx(right[row.pruned].float().mean().item())
        assert row.loss == pytest.approx(F.cross_entropy(logits, val.labels).item())
        became_wrong = (right[0] & ~right[row.pruned]).sum()
        became_right = (~right[0] & right[row.pruned]).sum()
        assert row.lost == pytest.approx((became_wrong - became_right).item() / 40, abs=1e-6)
        assert row.changed >= max((became_wrong + became_right).item() / 40 - 1e-6, row.lost)
    assert became_right > 0 and rows[0].lost == 0 and rows[-1].accuracy < 1
    assert [row.pruned for row in rows] == [0, 3, 6]


@pytest.mark.parametrize("zero_bias", [False, True])
def test_the_chosen_neurons_are_pruned_and_nothing_else(zero_bias, trained, mask, val, unchanged):
    result = Prune(rule="number", num_neurons=4, zero_bias=zero_bias)(unchanged(trained), mask, val)
    assert result.neurons == rank_neurons(mask)[:4] and result.chosen.pruned == 4
    expected = prune(trained, result.neurons, zero_bias=zero_bias).state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in result.model.state_dict().items()
    )
    prunes_bn1 = any(name == "bn1" for name, _ in result.neurons)
    assert torch.equal(result.model.bn1.bias, trained.bn1.bias) != zero_bias or not prunes_bn1


# Of 16 neurons, one of each of the two layers stays.
@pytest.mark.parametrize("number, pruned", [(0, 0), (1, 1), (9, 9), (14, 14), (99, 14)])
def test_number(number, pruned, trained, mask, val):
    result = Prune(rule="number", num_neurons=number, max_fraction=0.1)(trained, mask, val)
    assert len(result.neurons) == result.chosen.pruned == pruned


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.25, 0.5, 1.0])
def test_threshold(threshold, trained, mask, val):
    result = Prune(rule="threshold", threshold=threshold, max_fraction=0.1)(trained, mask, val)
    assert result.neurons == [n for n in rank_neurons(mask) if mask[n[0]][n[1]] <= threshold]


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "threshold", "threshold": 0.5},
        {"rule": "number", "num_neurons": 35},
        {"rule": "outlier"},
    ],
)
def test_rules_that_request_a_number_get_it_exactly(options, toy_model, val):
    """Beyond 32 neurons the counts of a sweep have gaps."""
    model = toy_model(width=40)
    mask = unit_mask(model)
    mask["bn1"][:35] = torch.arange(35) * 0.01
    assert 35 not in sweep_counts(78)
    assert len(Prune(max_fraction=1.0, **options)(model, mask, val).neurons) == 35


def test_outlier(trained, val):
    mask = unit_mask(trained)
    mask["bn1"][3], mask["bn2"][5], mask["bn2"][6] = 0.2, 0.9, 0.99
    result = Prune(rule="outlier", max_fraction=0.5)(trained, mask, val)
    assert result.neurons == [("bn1", 3), ("bn2", 5)]


def test_outlier_respects_max_fraction(trained, val):
    mask = unit_mask(trained)
    mask["bn1"][:5] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    assert len(Prune(rule="outlier", max_fraction=0.2)(trained, mask, val).neurons) == 3  # of 16


@pytest.mark.parametrize("fraction, largest", [(0.05, 1), (0.5, 8), (1.0, 14)])
def test_the_sweep_ends_at_max_fraction(fraction, largest, trained, mask, val):
    method = Prune(rule="accuracy_drop", max_fraction=fraction, max_accuracy_drop=0.99)
    assert method(trained, mask, val).sweep[-1].pruned == largest


@pytest.mark.parametrize("max_drop", [0.0, 0.05, 0.5])
def test_accuracy_drop(max_drop, trained, mask, val):
    method = Prune(rule="accuracy_drop", max_accuracy_drop=max_drop, max_fraction=1.0)
    result = method(trained, mask, val)
    before = predict(trained, val.images).argmax(1) == val.labels
    after = predict(result.model, val.images).argmax(1) == val.labels
    assert (before.float() - after.float()).mean() <= max_drop + 1e-6
    following = [point for point in result.sweep if point.pruned > result.chosen.pruned]
    assert following and following[0].lost > max_drop, "one more would have cost too much"


@pytest.mark.parametrize("max_change", [0.0, 0.05, 0.5])
def test_prediction_change(max_change, trained, mask, val):
    """The labels have no influence."""
    wrong = ImageSet(val.images, (val.labels + 1) % len(val.classes), val.classes)
    method = Prune(rule="prediction_change", max_accuracy_drop=max_change, max_fraction=1.0)
    result = method(trained, mask, wrong)
    before = predict(trained, val.images).argmax(1)
    after = predict(result.model, val.images).argmax(1)
    assert (before != after).float().mean() == pytest.approx(result.chosen.changed)
    assert result.chosen.changed <= max_change + 1e-6
    following = [point for point in result.sweep if point.pruned > result.chosen.pruned]
    assert following and following[0].changed > max_change, "one more would change too much"
    assert result.neurons == method(trained, mask, val).neurons


@pytest.mark.parametrize("rule, pruned", [("accuracy_drop", [2]), ("greedy", [2, 4])])
def test_a_needed_channel_stays(rule, pruned, trained, val):
    """Ranked: an unused channel, one that the accuracy needs, and another unused one."""
    with torch.no_grad():
        trained.fc.weight[:, [2, 4]] = 0
    val = ImageSet(val.images, predict(trained, val.images).argmax(1), val.classes)

    def cost(i):
        return sweep(trained, [("bn2", i)], np.array([0.0]), [0, 1], val)[1].lost

    needed = max((i for i in range(8) if i not in (2, 4)), key=cost)
    mask = unit_mask(trained)
    mask["bn2"][2], mask["bn2"][needed], mask["bn2"][4] = 0.0, 0.1, 0.2
    assert cost(needed) > 0.02 and cost(4) == 0
    result = Prune(rule=rule, max_fraction=0.2)(trained, mask, val)
    assert result.neurons == [("bn2", i) for i in pruned]


@pytest.mark.parametrize("max_drop", [0.0, 0.05, 0.3])
def test_greedy_pruning_within_an_accuracy_drop(max_drop, trained, mask, val):
    order = rank_neurons(mask)
    pruned = []

    def accuracy(neurons):
        predicted = predict(prune(trained, neurons), val.images).argmax(1)
        return (predicted == val.labels).float().mean().item()

    for neuron in order:
        if accuracy([]) - accuracy([*pruned, neuron]) <= max_drop + 1e-6:
            pruned.append(neuron)
    assert prune_greedily(trained, order, mask, val, max_drop, torch.inf)[0] == pruned
    assert 0 < len(pruned) < len(order)


@pytest.mark.parametrize("zero_bias", [False, True])
def test_greedy_points_are_those_of_a_sweep_over_the_pruned_neurons(
    zero_bias, trained, mask, val, unchanged
):
    pruned, points = prune_greedily(
        unchanged(trained), rank_neurons(mask), mask, val, 0.05, torch.inf, zero_bias=zero_bias
    )
    counts = list(range(len(pruned) + 1))
    values = sorted_values(pruned, mask)
    assert points == sweep(trained, pruned, values, counts, val, zero_bias=zero_bias)


@pytest.mark.parametrize("max_drop", [0.0, 0.3])
def test_the_rule_greedy_is_greedy_pruning_of_the_most_suspicious(max_drop, trained, mask, val):
    method = Prune(max_accuracy_drop=max_drop, max_loss_increase=9.0, max_fraction=0.5)
    result = method(trained, mask, val)
    pruned, _ = prune_greedily(trained, rank_neurons(mask)[:8], mask, val, max_drop, 9.0)
    assert result.neurons == result.order == pruned
    assert result.chosen == result.sweep[-1] and result.chosen.lost <= max_drop + 1e-6


@pytest.mark.parametrize("max_increase", [0.0, 0.01, 0.1])
def test_greedy_pruning_within_a_loss_increase(max_increase, trained, mask, val):
    order = rank_neurons(mask)
    pruned = []

    def loss(neurons):
        logits = predict(prune(trained, neurons), val.images)
        return F.cross_entropy(logits, val.labels).item()

    for neuron in order:
        if loss([*pruned, neuron]) - loss(pruned) <= max_increase:
            pruned.append(neuron)
    assert prune_greedily(trained, order, mask, val, 1.0, max_increase)[0] == pruned
    assert 0 < len(pruned) < len(order)


def test_greedy_prunes_nothing_when_every_neuron_is_needed(trained, mask, val, monkeypatch):
    def loss_without(i):
        return sweep(trained, [("bn2", i)], np.array([0.0]), [0, 1], val)[1].loss

    needed = [("bn2", i) for i in range(8) if loss_without(i) > 0.02]
    monkeypatch.setattr("rnp.prune.rank_neurons", lambda mask: needed)
    result = Prune(max_loss_increase=0.0)(trained, mask, val)
    assert needed and result.neurons == [] and len(result.sweep) == 1 and result.chosen.pruned == 0
    assert all(
        torch.equal(value, trained.state_dict()[name])
        for name, value in result.model.state_dict().items()
    )


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"max_accuracy_drop": 2},
            "prune.max_accuracy_drop must be in [0, 1), got 2; it is a fraction, not percent: did"
            " you mean 0.02?",
        ),
        ({"max_accuracy_drop": -0.1}, "prune.max_accuracy_drop must be in [0, 1), got -0.1"),
        ({"max_loss_increase": -1.0}, "prune.max_loss_increase must be 0 or more, got -1"),
        ({"max_fraction": 0}, "prune.max_fraction must be in (0, 1], got 0"),
        ({"max_fraction": 5}, "prune.max_fraction must be in (0, 1], got 5"),
        ({"num_neurons": -1}, "prune.num_neurons must be 0 or more, got -1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        Prune(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("zero_bias", [False, True])
def test_logits_along_a_sweep_are_those_of_pruned_copies(
    zero_bias, trained, mask, val, toy_set, unchanged
):
    """With several neurons, of several layers, per count; for sets of different sizes."""
    order = rank_neurons(mask)
    counts = [0, 1, 4, 9, 16]
    other = toy_set(7, seed=3)
    logits_by_count = logits_along_sweep(
        unchanged(trained), order, counts, val.images, other.images, zero_bias=zero_bias
    )
    for n, logits in zip(counts, logits_by_count, strict=True):
        pruned = prune(trained, order[:n], zero_bias=zero_bias)
        for actual, data in zip(logits, (val, other), strict=True):
            assert torch.allclose(actual, predict(pruned, data.images), atol=1e-6)
