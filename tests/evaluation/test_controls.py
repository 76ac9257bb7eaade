"""Control experiments on a toy network: the rows of each, and RNP as the stages run it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from rnp.errors import UserError
from rnp.evaluation.controls import Controls, Run, control_metrics, run_controls
from rnp.evaluation.metrics import EvaluationSets
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.seeds import generator
from rnp.types import DefenseSet, ImageSet
from rnp.unlearn import Unlearn


@pytest.fixture
def run(trained, toy_model, toy_set):
    """A run whose "repaired" model is the backdoored one, with 60 images of the defender."""
    tests = toy_set(40, seed=1)
    others = (tests.labels != 1).nonzero().squeeze(1)
    poisoned = ImageSet(toy_set(20, seed=2).images, torch.ones(20, dtype=torch.long), tests.classes)
    return Run(
        options=Controls(reinfection_images=(1, 20, 21), defense_sizes=(100, 60, 20)),
        unlearn=Unlearn(epochs=2, batch_size=10),
        recover=Recover(steps=2, batch_size=10),
        prune=Prune(),
        seed=5,
        benign=toy_model(),
        backdoored=trained,
        repaired=trained,
        defense=DefenseSet(toy_set(40, seed=3), toy_set(20, seed=4)),
        poisoned=poisoned,
        tests=EvaluationSets(tests, tests.subset(others), 1),
    )


def test_rnp_is_that_of_the_stages(run):
    """Its unlearning ends at the stop, which changes neither the model nor the masks."""
    clean = run.defense.train
    unlearned = run.unlearn(run.backdoored, clean, rng=generator(5, "unlearn"))
    recovered = run.recover(unlearned.model, clean, rng=generator(5, "recover"))
    pruned = run.prune(run.backdoored, recovered.mask, run.defense.all)
    result = run.rnp(run.backdoored, run.defense)
    assert result.chosen == pruned.chosen
    expected = pruned.model.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in result.model.state_dict().items()
    )


def test_rows_of_all_experiments(run, monkeypatch):
    """By this clock everything takes as long as fifty steps of fine-tuning."""
    clock = itertools.count()
    monkeypatch.setattr("rnp.clock.now", lambda: float(next(clock)))
    rows = list(run_controls(run))
    assert [(row["control"], row["model"], row["amount"]) for row in rows] == [
        ("benign", "benign", 60),
        ("reinfection", "repaired", 1),
        ("reinfection", "repaired", 20),
        ("reinfection", "benign", 1),
        ("reinfection", "benign", 20),
        ("equal_time", "backdoored", 50),
        ("defense_size", "backdoored", 60),
        ("defense_size", "backdoored", 20),
        ("distribution_shift", "backdoored", 60),
    ]
    assert all(row["seconds"] == 1.0 for row in rows)
    repairs = {"benign", "defense_size", "distribution_shift"}
    assert all((row["neurons_pruned"] != "") == (row["control"] in repairs) for row in rows)
    before = run.tests.score(run.benign).flat()
    assert {name: rows[0][f"{name}_before"] for name in before} == before
    metrics = control_metrics(rows, run.options.experiments)
    assert list(metrics) == list(run.options.experiments)
    assert set(metrics["reinfection"]) == {"repaired 1", "repaired 20", "benign 1", "benign 20"}
    assert metrics["benign"]["benign 60"]["der"] == rows[0]["der"]


def test_the_models_of_the_run_stay_as_they_are(run, unchanged):
    unchanged(run.backdoored)
    unchanged(run.benign)
    options = dataclasses.replace(run.options, experiments=("benign", "reinfection"))
    assert len(list(run_controls(dataclasses.replace(run, options=options)))) == 5


@pytest.mark.parametrize(
    "field, value, message",
    [
        (
            "experiments",
            ("bening",),
            "controls.experiments: unknown control 'bening'; did you mean",
        ),
        ("reinfection_images", (5, 0), "controls.reinfection_images must be above 0, got 0"),
        ("defense_sizes", (-1,), "controls.defense_sizes must be above 0, got -1"),
    ],
)
def test_out_of_range_fields_are_named(field, value, message):
    with pytest.raises(UserError, match=message):
        Controls(**{field: value})
