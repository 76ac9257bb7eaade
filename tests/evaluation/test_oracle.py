"""The oracle's choice on known sweeps, and the scores of all models of a small network."""

from __future__ import annotations

import copy

import pytest
import torch

from rnp.errors import UserError
from rnp.evaluation.metrics import EvaluationSets, defense_effectiveness
from rnp.evaluation.oracle import (
    Evaluate,
    PruningOrder,
    choose_oracle,
    evaluate_models,
    safe_window,
    sweep,
)
from rnp.neurons.masks import prune, rank_neurons
from rnp.types import ImageSet


def row(pruned, threshold, ca, asr):
    return {
        "pruned": pruned,
        "threshold": threshold,
        "clean_accuracy": ca,
        "attack_success_rate": asr,
    }


ROWS = [
    row(0, 0.0, 0.90, 1.0),
    row(1, 0.1, 0.89, 0.05),
    row(2, 0.2, 0.88, 0.05),
    row(3, 0.3, 0.85, 0.0),
    row(4, 0.4, 0.89, 0.2),
    row(5, 0.5, 0.90, 0.0),
    row(6, 0.9, 0.875, 0.0),
]


@pytest.mark.parametrize("epsilon, pruned", [(0.0, 5), (0.1, 3), (0.03, 5)])
def test_the_oracle_takes_the_lowest_asr_with_the_fewest_neurons(epsilon, pruned):
    assert choose_oracle(ROWS, epsilon)["pruned"] == pruned


def test_the_oracle_prunes_nothing_where_all_costs_too_much():
    assert choose_oracle([ROWS[0], ROWS[3]], 0.02)["pruned"] == 0


def test_the_safe_window_is_the_longest_run():
    assert safe_window(ROWS) == pytest.approx(0.4)  # from 0.5 to 0.9; the other is 0.1 wide
    assert safe_window(ROWS[:3]) == pytest.approx(0.1)
    assert safe_window(ROWS[:1]) == 0.0


@pytest.fixture
def case(trained, toy_set):
    """A network, an order of pruning by a random mask, and sets with target label 1."""
    rng = torch.Generator().manual_seed(0)
    mask = {name: torch.rand(8, generator=rng) for name in ("bn1", "bn2")}
    tests = toy_set(40)
    others = (tests.labels != 1).nonzero().squeeze(1)
    dark = ImageSet(tests.images // 2, tests.labels, tests.classes).subset(others)
    return trained, PruningOrder(rank_neurons(mask), mask, 3), EvaluationSets(tests, dark, 1)


def test_each_row_of_the_sweep_is_the_score_of_a_pruned_model(case):
    model, pruning, sets = case
    options = Evaluate(sweep_images=20, sweep_fraction=0.5)
    rows = sweep(model, pruning, sets, options)
    half = len(pruning.neurons) // 2
    assert [row["pruned"] for row in rows] == list(range(half + 1))
    assert [row["threshold"] for row in rows] == pytest.approx([0.0, *pruning.values[:half]])
    for line in rows:
        pruned = prune(model, pruning.neurons[: line["pruned"]])
        expected = sets.first(20).score(pruned).flat()
        assert {name: line[name] for name in expected} == pytest.approx(expected)


def test_the_sweep_reaches_the_chosen_point(case):
    model, pruning, sets = case
    rows = sweep(model, pruning, sets, Evaluate(sweep_images=5, sweep_fraction=0.01))
    assert [row["pruned"] for row in rows] == [0, 1, 2, 3]


def test_metrics_of_all_models(case, toy_model, unchanged):
    model, pruning, sets = case
    unchanged(model)
    models = {"backdoored": model, "rnp": prune(model, pruning.neurons[:3]), "benign": toy_model()}
    options = Evaluate(sweep_fraction=0.5, oracle_epsilon=0.1)
    evaluation = evaluate_models(iter(models.items()), copy.deepcopy(model), pruning, sets, options)
    assert list(evaluation.scores) == ["backdoored", "rnp", "benign", "oracle"]
    for name, network in models.items():
        assert evaluation.scores[name] == sets.score(network)
    oracle = prune(model, pruning.neurons[: evaluation.oracle_pruned])
    assert evaluation.scores["oracle"] == sets.score(oracle)
    metrics = evaluation.metrics()
    before = evaluation.scores["backdoored"]
    after = evaluation.scores["rnp"]
    assert metrics["clean_accuracy"] == after.clean_accuracy.value
    assert metrics["clean_accuracy_before"] == before.clean_accuracy.value
    assert metrics["der"] == defense_effectiveness(before, after)
    assert metrics["intervals"]["robust_accuracy"] == after.robust_accuracy.interval()
    assert (metrics["n_clean"], metrics["n_triggered"]) == (40, 30)
    assert (metrics["neurons_pruned"], metrics["neurons"]) == (3, 16)
    assert metrics["threshold"] == pytest.approx(sorted(torch.cat([*pruning.mask.values()]))[2])
    assert metrics["oracle"]["neurons_pruned"] == evaluation.oracle_pruned
    assert metrics["models"]["benign"]["clean_accuracy"] == metrics["clean_accuracy_benign"]


def test_no_pruned_neuron_has_no_threshold(case):
    model, pruning, sets = case
    order = PruningOrder(pruning.neurons, pruning.mask, 0)
    models = [("backdoored", model), ("rnp", model), ("benign", model)]
    metrics = evaluate_models(models, model, order, sets, Evaluate()).metrics()
    assert metrics["threshold"] == 0.0
    assert metrics["neurons_pruned"] == 0


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("sweep_images", 0, "evaluate.sweep_images must be at least 1, got 0"),
        ("sweep_fraction", 5.0, r"evaluate.sweep_fraction must be in \(0, 1\], got 5"),
        ("sweep_fraction", 0.0, r"evaluate.sweep_fraction must be in \(0, 1\], got 0"),
    ],
)
def test_out_of_range_fields_are_named(field, value, message):
    with pytest.raises(UserError, match=message):
        Evaluate(**{field: value})
