"""Control experiments: RNP without a backdoor, re-infection, equal time, few or shifted images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from annotated_types import Gt
from torch import nn

from rnp.clock import timed
from rnp.data.base import interleave
from rnp.defenses.ft import FT
from rnp.defenses.rnp import RNP, RNPResult
from rnp.errors import UserError
from rnp.evaluation.metrics import EvaluationSets, Scores, defense_effectiveness
from rnp.params.ranges import Hyperparameters
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.registry import suggest
from rnp.seeds import generator, root
from rnp.types import DefenseSet, ImageSet, to_bytes
from rnp.unlearn import Unlearn

Row = dict[str, object]
NOISE = 0.05
"""Deviation of the noise on shifted images, of full scale."""
BRIGHTNESS = 0.7
"""Factor on the pixels of shifted images."""
REINFECTION = FT(lr=0.01, steps=100)
TIMING_STEPS = 50
"""Fine-tuning steps by which the time of one is measured."""
SUMMARY = (
    "clean_accuracy_before",
    "attack_success_rate_before",
    "clean_accuracy",
    "attack_success_rate",
    "der",
)
"""The columns that are metrics."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls(Hyperparameters):
    """Which control experiments run, and how large they are."""

    experiments: Annotated[
        tuple[str, ...],
        "controls to run: benign, reinfection, equal_time, defense_size, distribution_shift",
    ] = ("benign", "reinfection", "equal_time", "defense_size", "distribution_shift")
    reinfection_images: Annotated[
        tuple[Annotated[int, Gt(0)], ...],
        "reinfection: poisoned images among the defender's, in fine-tuning",
    ] = (1, 5, 10, 50)
    defense_sizes: Annotated[
        tuple[Annotated[int, Gt(0)], ...], "defense_size: clean images that the defender has"
    ] = (500, 250, 100, 50, 10)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.experiments:
            if name not in EXPERIMENTS:
                suggestion = suggest(name, list(EXPERIMENTS))
                raise UserError(f"controls.experiments: unknown control {name!r}{suggestion}")


@dataclasses.dataclass(frozen=True)
class Run:
    """The models and images of a finished run, and the settings of RNP."""

    options: Controls
    unlearn: Unlearn
    recover: Recover
    prune: Prune
    seed: int
    benign: nn.Module
    backdoored: nn.Module
    repaired: nn.Module
    defense: DefenseSet
    poisoned: ImageSet
    tests: EvaluationSets

    def rnp(self, model: nn.Module, defense: DefenseSet) -> RNPResult:
        """RNP with the seed of the stages, which gives what they give."""
        # What comes after the stop serves detection only.
        unlearn = dataclasses.replace(self.unlearn, until_collapse=False)
        method = RNP(unlearn=unlearn, recover=self.recover, prune=self.prune)
        return method.repair(model, defense, rng=root(self.seed))


def run_controls(run: Run) -> Iterator[Row]:
    """The rows of all experiments, each as soon as it is there."""
    for control in run.options.experiments:
        for row in EXPERIMENTS[control](run):
            yield {"control": control, "neurons_pruned": "", **row}


def control_metrics(rows: list[Row], experiments: tuple[str, ...]) -> dict[str, dict[str, Row]]:
    """The accuracies by experiment, and by model and amount."""
    return {
        control: {
            f"{row['model']} {row['amount']}": {name: row[name] for name in SUMMARY}
            for row in rows
            if row["control"] == control
        }
        for control in experiments
    }


def comparison_row(run: Run, before: Scores, after: nn.Module, about: Row) -> Row:
    """A row: the scores of a model, beside those before its change."""
    scores = run.tests.score(after)
    return {
        **about,
        **{f"{name}_before": value for name, value in before.flat().items()},
        **scores.flat(),
        "der": defense_effectiveness(before, scores),
    }


def repair_row(run: Run, name: str, model: nn.Module, before: Scores, defense: DefenseSet) -> Row:
    """A row for RNP on `model` with the images of `defense`, whose number is the amount."""
    result, seconds = timed(lambda: run.rnp(model, defense))
    about: Row = {
        "model": name,
        "amount": len(defense.train) + len(defense.val),
        "neurons_pruned": result.chosen.pruned if result.chosen else 0,
        "seconds": seconds,
    }
    return comparison_row(run, before, result.model, about)


def benign(run: Run) -> Iterator[Row]:
    """RNP on a model without a backdoor."""
    before = run.tests.score(run.benign)
    yield repair_row(run, "benign", run.benign, before, run.defense)


def reinfection(run: Run) -> Iterator[Row]:
    """Fine-tuning of the repaired model on the defender's images and a few poisoned ones.

    The benign model is fine-tuned too: if it learns the backdoor as fast, the return of the
    backdoor in the repaired model is no sign that pruning left a part of it.
    """
    rng = generator(run.seed, "controls/poisoned")
    order = torch.randperm(len(run.poisoned), generator=rng)
    for name, model in (("repaired", run.repaired), ("benign", run.benign)):
        before = run.tests.score(model)
        for amount in run.options.reinfection_images:
            if amount > len(run.poisoned):
                continue
            poisoned = run.poisoned.subset(order[:amount])
            tuned, seconds = timed(functools.partial(_reinfect, run, model, poisoned))
            about: Row = {"model": name, "amount": amount, "seconds": seconds}
            yield comparison_row(run, before, tuned, about)


def _reinfect(run: Run, model: nn.Module, poisoned: ImageSet) -> nn.Module:
    mixed = DefenseSet(DefenseSet(run.defense.train, poisoned).all, run.defense.val)
    rng = generator(run.seed, "controls/relapse")
    return REINFECTION.repair(model, mixed, rng=rng).model


def equal_time_fine_tuning(run: Run) -> Iterator[Row]:
    """Plain fine-tuning for as long as RNP takes.

    The amount is the number of steps in that time, which depends on the machine.
    """
    rng = generator(run.seed, "controls/same_time")

    def fine_tune(steps: int) -> nn.Module:
        return FT(steps=steps).repair(run.backdoored, run.defense, rng=rng).model

    _, allowed = timed(lambda: run.rnp(run.backdoored, run.defense))
    _, timing = timed(lambda: fine_tune(TIMING_STEPS))
    steps = max(1, round(allowed / (timing / TIMING_STEPS)))
    tuned, seconds = timed(lambda: fine_tune(steps))
    before = run.tests.score(run.backdoored)
    about: Row = {"model": "backdoored", "amount": steps, "seconds": seconds}
    yield comparison_row(run, before, tuned, about)


def defense_size(run: Run) -> Iterator[Row]:
    """RNP with fewer clean images."""
    everything = run.defense.all
    before = run.tests.score(run.backdoored)
    rng = generator(run.seed, "controls/images")
    order = interleave(everything.labels, len(everything.classes), rng)
    for amount in run.options.defense_sizes:
        if amount > len(everything):
            continue
        half = amount // 2
        fewer = DefenseSet(everything.subset(order[:half]), everything.subset(order[half:amount]))
        yield repair_row(run, "backdoored", run.backdoored, before, fewer)


def distribution_shift(run: Run) -> Iterator[Row]:
    """RNP with darker, noisy images."""
    rng = generator(run.seed, "controls/shifted")

    def shifted(data: ImageSet) -> ImageSet:
        noise = NOISE * torch.randn(data.images.shape, generator=rng)
        images = to_bytes(BRIGHTNESS * data.as_floats() + noise)
        return ImageSet(images, data.labels, data.classes)

    before = run.tests.score(run.backdoored)
    defense = DefenseSet(shifted(run.defense.train), shifted(run.defense.val))
    yield repair_row(run, "backdoored", run.backdoored, before, defense)


EXPERIMENTS: dict[str, Callable[[Run], Iterator[Row]]] = {
    "benign": benign,
    "reinfection": reinfection,
    "equal_time": equal_time_fine_tuning,
    "defense_size": defense_size,
    "distribution_shift": distribution_shift,
}
