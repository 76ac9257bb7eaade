"""Which point of a sweep is taken, and that the cut is exactly there."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rnp.errors import UserError
from rnp.neurons.masks import unit_mask, prune, rank_neurons
from rnp.prune import (
    SweepPoint,
    Prune,
    logits_along_sweep,
    sweep_counts,
    prune_greedily,
    knee,
    last_within_budget,
    outlier_bound,
    sorted_values,
    sweep,
)
from rnp.training.predict import predict
from rnp.types import ImageSet


def points(lost=(), loss=(), threshold=(), changed=(), step=1) -> list[SweepPoint]:
    n = max(map(len, (lost, loss, threshold, changed)))

    def row(values, i):
        return values[i] if values else 0.0

    return [
        SweepPoint(
            pruned=i * step,
            threshold=row(threshold, i),
            accuracy=1 - row(lost, i),
            loss=row(loss, i),
            lost=row(lost, i),
            changed=row(changed, i),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize(
    "lost, chosen",
    [
        ([0, 0, 0.01, 0.02, 0.03], 3),
        ([0, 0.01, 0.05, 0.0, 0.0], 1),  # the first violation ends it, though accuracy comes back
        ([0, 0.03], 0),
        ([0, -0.01, 0.02, 0.02], 3),
        ([0], 0),
    ],
)
def test_last_within(lost, chosen):
    assert (
        last_within_budget(points(lost), 0.02).pruned
        == last_within_budget(points(changed=lost), 0.02, "changed").pruned
        == chosen
    )


@pytest.mark.parametrize(
    "loss, step, chosen",
    [
        ([1, 1, 1, 1, 2, 3, 4], 1, 3),
        ([1, 1, 1, 1, 2, 3, 4], 5, 15),
        ([0.0, 0.0, 0.0, 9.0], 1, 2),
        ([1, 2, 3, 4], 1, 0),  # a straight line has no knee
        ([1], 1, 0),
        ([4, 3, 1, 1, 2, 4], 1, 2),  # the first of equals
    ],
)
def test_knee(loss, step, chosen):
    assert knee(points(loss=loss, step=step)).pruned == chosen


@pytest.mark.parametrize(
    "values, bound",
    [
        ([0.0, 1, 1, 1, 1], 1 - 3.5 * 0.01),  # most masks are 1: the floor
        ([0.2, 0.8, 0.9, 1.0, 0.9], 0.9 - 3.5 * 1.4826 * 0.1),
    ],
)
def test_outlier_bound(values, bound):
    assert outlier_bound(np.array(values)) == pytest.approx(bound)


@pytest.mark.parametrize("most", [0, 1, 5, 32, 33, 100, 4800])
@pytest.mark.parametrize("extra", [(), (3, 47, 9999)])
def test_the_grid_is_fine(most, extra):
    counts = sweep_counts(most, extra)
    assert counts == sorted(set(counts)) and counts[0] == 0 and counts[-1] == most
    assert set(range(min(most, 32) + 1)) | {e for e in extra if e <= most} <= set(counts)
    assert all(b <= a + max(1, 0.0601 * a) for a, b in itertools.pairwise(counts))
    assert len(counts) < 130


@pytest.fixture
def mask(trained, rng):
    """Random, all different."""
    return {
        name: torch.rand(len(value), generator=rng()) for name, value in unit_mask(trained).items()
    }


@pytest.fixture
def val(toy_set):
    return toy_set(40, seed=7)


def test_the_sweep_by_hand(trained, mask, val):
    val = ImageSet(
        val.images, val.labels.where(torch.arange(40) % 3 > 0, 0), val.classes
    )  # so that some turn right
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
        turned_wrong, turned_right = (
            (right[0] & ~right[row.pruned]).sum(),
            (~right[0] & right[row.pruned]).sum(),
        )
        assert row.lost == pytest.approx((turned_wrong - turned_right).item() / 40, abs=1e-6)
        assert row.changed >= max((turned_wrong + turned_right).item() / 40 - 1e-6, row.lost)
    assert (
        turned_right > 0
        and [row.pruned for row in rows] == [0, 3, 6]
        and rows[0].lost == 0
        and rows[-1].accuracy < 1
    )


@pytest.mark.parametrize("zero_bias", [False, True])
def test_the_cut_is_the_chosen_neurons_and_nothing_else(zero_bias, trained, mask, val, unchanged):
    result = Prune(rule="number", num_neurons=4, zero_bias=zero_bias)(unchanged(trained), mask, val)
    assert result.neurons == rank_neurons(mask)[:4] and result.chosen.pruned == 4
    expected = prune(trained, result.neurons, zero_bias=zero_bias).state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in result.model.state_dict().items()
    )
    assert torch.equal(result.model.bn1.bias, trained.bn1.bias) != zero_bias or not any(
        name == "bn1" for name, _ in result.neurons
    )


@pytest.mark.parametrize(
    "number, pruned", [(0, 0), (1, 1), (9, 9), (14, 14), (99, 14)]
)  # 16 neurons, one of each layer stays
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
        {"rule": "number", "number": 35},
        {"rule": "outlier"},
    ],
)
def test_no_rule_is_blurred_by_the_grid(options, toy_model, val):
    """Beyond 32 neurons the grid has gaps, which a rule that names its neurons does not have."""
    model = toy_model(width=40)
    mask = unit_mask(model)
    mask["bn1"][:35] = torch.arange(35) * 0.01
    assert (
        35 not in sweep_counts(78)
        and len(Prune(max_fraction=1.0, **options)(model, mask, val).neurons) == 35
    )


def test_outlier(trained, val):
    mask = unit_mask(trained)
    mask["bn1"][3], mask["bn2"][5], mask["bn2"][6] = 0.2, 0.9, 0.99
    result = Prune(rule="outlier", max_fraction=0.5)(trained, mask, val)
    assert result.neurons == [("bn1", 3), ("bn2", 5)]


def test_outlier_keeps_to_the_largest_share(trained, val):
    mask = unit_mask(trained)
    mask["bn1"][:5] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    assert len(Prune(rule="outlier", max_fraction=0.2)(trained, mask, val).neurons) == 3  # of 16


@pytest.mark.parametrize("fraction, most", [(0.05, 1), (0.5, 8), (1.0, 14)])
def test_the_sweep_ends_at_the_largest_share(fraction, most, trained, mask, val):
    assert (
        Prune(rule="accuracy_drop", max_fraction=fraction, max_accuracy_drop=0.99)(
            trained, mask, val
        )
        .sweep[-1]
        .pruned
        == most
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.5])
def test_val_drop_keeps_its_word(epsilon, trained, mask, val):
    result = Prune(rule="accuracy_drop", max_accuracy_drop=epsilon, max_fraction=1.0)(
        trained, mask, val
    )
    before, after = (
        predict(model, val.images).argmax(1) == val.labels for model in (trained, result.model)
    )
    assert (before.float() - after.float()).mean() <= epsilon + 1e-6
    following = [point for point in result.sweep if point.pruned > result.chosen.pruned]
    assert following and following[0].lost > epsilon, "one more would have cost too much"


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.5])
def test_divergence_keeps_its_word(epsilon, trained, mask, val):
    """Labels play no part in it."""
    wrong = ImageSet(val.images, (val.labels + 1) % len(val.classes), val.classes)
    result = Prune(rule="prediction_change", max_accuracy_drop=epsilon, max_fraction=1.0)(
        trained, mask, wrong
    )
    before, after = (predict(model, val.images).argmax(1) for model in (trained, result.model))
    assert (before != after).float().mean() == pytest.approx(
        result.chosen.changed
    ) and result.chosen.changed <= epsilon + 1e-6
    following = [point for point in result.sweep if point.pruned > result.chosen.pruned]
    assert following and following[0].changed > epsilon, "one more would have changed too much"
    assert (
        result.neurons
        == Prune(rule="prediction_change", max_accuracy_drop=epsilon, max_fraction=1.0)(
            trained, mask, val
        ).neurons
    )


@pytest.mark.parametrize("rule, gone", [("accuracy_drop", [2]), ("greedy", [2, 4])])
def test_a_needed_channel_stays(rule, gone, trained, val):
    """Ranked: a channel that nothing reads, one without which accuracy falls, and another that
    nothing reads.
    """
    with torch.no_grad():
        trained.fc.weight[:, [2, 4]] = 0
    val = ImageSet(val.images, predict(trained, val.images).argmax(1), val.classes)

    def cost(i):
        return sweep(trained, [("bn2", i)], np.array([0.0]), [0, 1], val)[1].lost

    needed = max((i for i in range(8) if i not in (2, 4)), key=cost)
    mask = unit_mask(trained)
    mask["bn2"][2], mask["bn2"][needed], mask["bn2"][4] = 0.0, 0.1, 0.2
    assert cost(needed) > 0.02 and cost(4) == 0
    assert Prune(rule=rule, max_fraction=0.2)(trained, mask, val).neurons == [
        ("bn2", i) for i in gone
    ]


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3])
def test_harmless_is_greedy(epsilon, trained, mask, val):
    order, gone = rank_neurons(mask), []

    def accuracy(neurons):
        return (
            (predict(prune(trained, neurons), val.images).argmax(1) == val.labels)
            .float()
            .mean()
            .item()
        )

    for neuron in order:
        if accuracy([]) - accuracy([*gone, neuron]) <= epsilon + 1e-6:
            gone.append(neuron)
    assert prune_greedily(trained, order, mask, val, epsilon, torch.inf)[0] == gone and 0 < len(
        gone
    ) < len(order)


@pytest.mark.parametrize("zero_bias", [False, True])
def test_the_points_of_harmless_are_those_of_a_sweep_over_what_went(
    zero_bias, trained, mask, val, unchanged
):
    gone, points = prune_greedily(
        unchanged(trained), rank_neurons(mask), mask, val, 0.05, torch.inf, zero_bias=zero_bias
    )
    assert points == sweep(
        trained,
        gone,
        sorted_values(gone, mask),
        list(range(len(gone) + 1)),
        val,
        zero_bias=zero_bias,
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_skip_takes_all_that_is_harmless_among_the_most_suspicious(epsilon, trained, mask, val):
    result = Prune(max_accuracy_drop=epsilon, max_loss_increase=9.0, max_fraction=0.5)(
        trained, mask, val
    )
    assert (
        result.neurons
        == result.order
        == prune_greedily(trained, rank_neurons(mask)[:8], mask, val, epsilon, 9.0)[0]
    )
    assert result.chosen == result.sweep[-1] and result.chosen.lost <= epsilon + 1e-6


@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.1])
def test_no_neuron_that_goes_raises_the_loss_by_more_than_its_tolerance(
    tolerance, trained, mask, val
):
    order, gone = rank_neurons(mask), []

    def loss(neurons):
        return torch.nn.functional.cross_entropy(
            predict(prune(trained, neurons), val.images), val.labels
        ).item()

    for neuron in order:
        if loss([*gone, neuron]) - loss(gone) <= tolerance:
            gone.append(neuron)
    assert prune_greedily(trained, order, mask, val, 1.0, tolerance)[0] == gone and 0 < len(
        gone
    ) < len(order)


def test_skip_leaves_the_model_as_it_is_when_every_neuron_is_needed(
    trained, mask, val, monkeypatch
):
    needs = [
        i
        for i in range(8)
        if sweep(trained, [("bn2", i)], np.array([0.0]), [0, 1], val)[1].loss > 0.02
    ]
    monkeypatch.setattr("rnp.prune.ranking", lambda mask: [("bn2", i) for i in needs])
    result = Prune(max_loss_increase=0.0)(trained, mask, val)
    assert needs and result.neurons == [] and len(result.sweep) == 1 and result.chosen.pruned == 0
    assert all(
        torch.equal(value, trained.state_dict()[name])
        for name, value in result.model.state_dict().items()
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epsilon": 2}, "prune.epsilon must be in [0, 1), got 2; it is a fraction, not percent"),
        ({"epsilon": -0.1}, "prune.epsilon"),
        ({"tolerance": -1.0}, "prune.tolerance must be 0 or more nats, got -1"),
        ({"max_fraction": 0}, "prune.max_fraction must be in (0, 1], got 0"),
        ({"max_fraction": 5}, "prune.max_fraction"),
        ({"number": -1}, "prune.number must be 0 or more, got -1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError) as caught:
        Prune(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("zero_bias", [False, True])
def test_cut_by_cut_is_pruning_anew_each_time(
    zero_bias, trained, mask, val, toy_set, rng, unchanged
):
    """Several neurons, of several layers, between two looks; on sets of different sizes."""
    order, counts, other = rank_neurons(mask), [0, 1, 4, 9, 16], toy_set(7, seed=3)
    found = list(
        logits_along_sweep(
            unchanged(trained), order, counts, val.images, other.images, zero_bias=zero_bias
        )
    )
    for n, logits in zip(counts, found, strict=True):
        pruned = prune(trained, order[:n], zero_bias=zero_bias)
        assert all(
            torch.allclose(one, predict(pruned, data.images), atol=1e-6)
            for one, data in zip(logits, (val, other), strict=True)
        )
