"""What nobody reports: what a repair costs without a backdoor, how soon one returns, what time or
fewer images do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from annotated_types import Gt
from torch import nn

from rnp.data.base import interleave
from rnp.defenses.ft import FT
from rnp.errors import UserError
from rnp.evaluation.metrics import Scores, defense_effectiveness, score
from rnp.params.ranges import Hyperparameters
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.registry import suggest
from rnp.seeds import generator
from rnp.training.device import chosen_precision
from rnp.types import DefenseSet, ImageSet, to_bytes
from rnp.unlearn import Unlearn

NOISE, DARKER = 0.05, 0.7  # of the shifted images, in full scale
REINFECTION = FT(lr=0.01, steps=100)
TIMING_STEPS = 50  # steps of fine-tuning that tell how long one takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls(Hyperparameters):
    experiments: Annotated[
        tuple[str, ...],
        "controls to run: benign, reinfection, equal_time, defense_size, distribution_shift",
    ] = ("benign", "reinfection", "equal_time", "defense_size", "distribution_shift")
    reinfection_images: Annotated[
        tuple[Annotated[int, Gt(0)], ...],
        "reinfection: poisoned images among the defender's, in tuning",
    ] = (1, 5, 10, 50)
    defense_sizes: Annotated[
        tuple[Annotated[int, Gt(0)], ...], "defense_size: clean images that the defender has"
    ] = (
        500,
        250,
        100,
        50,
        10,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.experiments:
            if name not in EXPERIMENTS:
                raise UserError(
                    f"controls.experiments: unknown control {name!r}{suggest(name, list(EXPERIMENTS))}"
                )


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as its stages left it."""

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
    tests: ImageSet
    attacked: ImageSet
    target: int | None

    def scores(self, model: nn.Module) -> Scores:
        return score(model, self.tests, self.attacked, self.target, precision=chosen_precision())

    def rnp(self, model: nn.Module, defense: DefenseSet) -> tuple[nn.Module, int]:
        """The method as the stages run it, up to the stop that it needs: the repaired copy, and
        how many neurons it lost.
        """
        to_the_stop = dataclasses.replace(
            self.unlearn, until_collapse=False
        )  # what comes after it serves detection
        unlearned = to_the_stop(model, defense.train, rng=generator(self.seed, "unlearn")).model
        mask = self.recover(unlearned, defense.train, rng=generator(self.seed, "recover")).mask
        pruned = self.prune(model, mask, defense.all)
        return pruned.model, pruned.chosen.pruned


def comparison_row(
    run: Run, before: Scores, after: nn.Module, about: dict[str, object]
) -> dict[str, object]:
    """A row: a model on the test images, beside what it came from."""
    new = run.scores(after)
    return (
        about
        | {f"{name}_before": value for name, value in before.flat().items()}
        | new.flat()
        | {"der": defense_effectiveness(before, new)}
    )


def repair(
    run: Run, model: nn.Module, before: Scores, defense: DefenseSet, about: dict[str, object]
) -> dict[str, object]:
    start = time.perf_counter()
    repaired, pruned = run.rnp(model, defense)
    seconds = time.perf_counter() - start
    return comparison_row(
        run, before, repaired, about | {"neurons_pruned": pruned, "seconds": seconds}
    )


def benign(run: Run) -> Iterator[dict[str, object]]:
    yield repair(
        run,
        run.benign,
        run.scores(run.benign),
        run.defense,
        {"model": "benign", "amount": len(run.defense.all)},
    )


def reinfection(run: Run) -> Iterator[dict[str, object]]:
    """Would a model that never held the backdoor learn it as fast? Then its return says nothing
    about what was left.
    """
    for model, net in (("repaired", run.repaired), ("benign", run.benign)):
        before = run.scores(net)
        for amount in (n for n in run.options.reinfection_images if n <= len(run.poisoned)):
            few = run.poisoned.subset(
                torch.randperm(
                    len(run.poisoned), generator=generator(run.seed, "controls/poisoned")
                )[:amount]
            )
            mixed = DefenseSet(DefenseSet(run.defense.train, few).all, run.defense.val)
            start = time.perf_counter()
            tuned = REINFECTION.repair(
                net, mixed, rng=generator(run.seed, "controls/relapse")
            ).model
            seconds = time.perf_counter() - start
            yield comparison_row(
                run, before, tuned, {"model": model, "amount": amount, "seconds": seconds}
            )


def equal_time_fine_tuning(run: Run) -> Iterator[dict[str, object]]:
    """Plain fine-tuning for as long as RNP takes; the steps that fit, which are the row's amount,
    depend on the machine.
    """
    rng = generator(run.seed, "controls/same_time")

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    allowed = seconds(lambda: run.rnp(run.backdoored, run.defense))
    each = (
        seconds(lambda: FT(steps=TIMING_STEPS).repair(run.backdoored, run.defense, rng=rng))
        / TIMING_STEPS
    )
    steps, tuned = max(1, round(allowed / each)), []
    taken = seconds(
        lambda: tuned.append(FT(steps=steps).repair(run.backdoored, run.defense, rng=rng).model)
    )
    yield comparison_row(
        run,
        run.scores(run.backdoored),
        tuned[0],
        {"model": "backdoored", "amount": steps, "seconds": taken},
    )


def defense_size(run: Run) -> Iterator[dict[str, object]]:
    everything, before = run.defense.all, run.scores(run.backdoored)
    order = interleave(
        everything.labels, len(everything.classes), generator(run.seed, "controls/images")
    )
    for amount in (n for n in run.options.defense_sizes if n <= len(everything)):
        half = amount // 2
        fewer = DefenseSet(everything.subset(order[:half]), everything.subset(order[half:amount]))
        yield repair(run, run.backdoored, before, fewer, {"model": "backdoored", "amount": amount})


def distribution_shift(run: Run) -> Iterator[dict[str, object]]:
    rng = generator(run.seed, "controls/shifted")

    def darker(data: ImageSet) -> ImageSet:
        changed = DARKER * data.as_floats() + NOISE * torch.randn(data.images.shape, generator=rng)
        return ImageSet(to_bytes(changed), data.labels, data.classes)

    yield repair(
        run,
        run.backdoored,
        run.scores(run.backdoored),
        DefenseSet(darker(run.defense.train), darker(run.defense.val)),
        {"model": "backdoored", "amount": len(run.defense.all)},
    )


EXPERIMENTS = {
    "benign": benign,
    "reinfection": reinfection,
    "equal_time": equal_time_fine_tuning,
    "defense_size": defense_size,
    "distribution_shift": distribution_shift,
}
