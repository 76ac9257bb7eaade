"""What nobody reports: what a repair costs without a backdoor, how soon one returns, what time or
fewer images do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import click
import torch
from torch import nn

from rnp.cli.check import leaves, read_params
from rnp.cli.options import command, from_section, generator
from rnp.data.base import interleave
from rnp.defences.ft import FT
from rnp.errors import UserError
from rnp.io import (
    load_defence_set,
    load_images,
    load_model,
    load_poisoned,
    read_json,
    write_json,
    write_rows,
)
from rnp.metrics import Scores, defence_effectiveness, score
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.registry import suggest
from rnp.types import DefenceSet, ImageSet, to_bytes
from rnp.unlearn import Unlearn

NOISE, DARKER = 0.05, 0.7  # of the shifted images, in full scale
RELAPSE = FT(lr=0.01, steps=100)
TRIAL = 50  # steps of fine-tuning that tell how long one takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    ask: Annotated[
        tuple[str, ...], "controls to run: benign, relapse, same_time, images, shifted"
    ] = ("benign", "relapse", "same_time", "images", "shifted")
    relapse_with: Annotated[
        tuple[int, ...], "relapse: poisoned images among the defender's, in tuning"
    ] = (1, 5, 10, 50)
    repair_with: Annotated[tuple[int, ...], "images: clean images that the defender has"] = (
        500,
        250,
        100,
        50,
        10,
    )

    def __post_init__(self) -> None:
        for name in self.ask:
            if name not in ASK:
                raise UserError(f"controls.ask: unknown control {name!r}{suggest(name, list(ASK))}")
        for name in ("relapse_with", "repair_with"):
            if any(number < 1 for number in getattr(self, name)):
                raise UserError(
                    f"controls.{name} must hold numbers above 0, got {list(getattr(self, name))}"
                )


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as its stages left it."""

    options: Controls
    unlearn: Unlearn
    recover: Recover
    prune: Prune
    seed: int
    twin: nn.Module
    victim: nn.Module
    repaired: nn.Module
    defence: DefenceSet
    poisoned: ImageSet
    tests: ImageSet
    attacked: ImageSet
    target: int | None

    def scores(self, model: nn.Module) -> Scores:
        return score(model, self.tests, self.attacked, self.target, precision="auto")

    def rnp(self, model: nn.Module, defence: DefenceSet) -> tuple[nn.Module, int]:
        """The method as the stages run it, up to the stop that it needs: the repaired copy, and
        how many neurons it lost.
        """
        to_the_stop = dataclasses.replace(
            self.unlearn, to_collapse=False
        )  # what comes after it serves detection
        unlearned = to_the_stop(model, defence.train, rng=generator(self.seed, "unlearn")).model
        mask = self.recover(unlearned, defence.train, rng=generator(self.seed, "recover")).mask
        pruned = self.prune(model, mask, defence.both)
        return pruned.model, pruned.chosen.pruned


def compared(
    run: Run, before: Scores, after: nn.Module, about: dict[str, object]
) -> dict[str, object]:
    """A row: a model on the test images, beside what it came from."""
    new = run.scores(after)
    return (
        about
        | {f"{name}_before": value for name, value in before.flat().items()}
        | new.flat()
        | {"der": defence_effectiveness(before, new)}
    )


def repair(
    run: Run, model: nn.Module, before: Scores, defence: DefenceSet, about: dict[str, object]
) -> dict[str, object]:
    start = time.perf_counter()
    repaired, pruned = run.rnp(model, defence)
    seconds = time.perf_counter() - start
    return compared(run, before, repaired, about | {"neurons_pruned": pruned, "seconds": seconds})


def benign(run: Run) -> Iterator[dict[str, object]]:
    yield repair(
        run,
        run.twin,
        run.scores(run.twin),
        run.defence,
        {"model": "twin", "amount": len(run.defence.both)},
    )


def relapse(run: Run) -> Iterator[dict[str, object]]:
    """Would a model that never held the backdoor learn it as fast? Then its return says nothing
    about what was left.
    """
    for model, net in (("repaired", run.repaired), ("twin", run.twin)):
        before = run.scores(net)
        for amount in (n for n in run.options.relapse_with if n <= len(run.poisoned)):
            few = run.poisoned.subset(
                torch.randperm(
                    len(run.poisoned), generator=generator(run.seed, "controls/poisoned")
                )[:amount]
            )
            mixed = DefenceSet(DefenceSet(run.defence.train, few).both, run.defence.val)
            start = time.perf_counter()
            tuned = RELAPSE.repair(net, mixed, rng=generator(run.seed, "controls/relapse")).model
            seconds = time.perf_counter() - start
            yield compared(
                run, before, tuned, {"model": model, "amount": amount, "seconds": seconds}
            )


def same_time(run: Run) -> Iterator[dict[str, object]]:
    """Plain fine-tuning for as long as RNP takes; the steps that fit, which are the row's amount,
    depend on the machine.
    """
    rng = generator(run.seed, "controls/same_time")

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    allowed = seconds(lambda: run.rnp(run.victim, run.defence))
    each = seconds(lambda: FT(steps=TRIAL).repair(run.victim, run.defence, rng=rng)) / TRIAL
    steps, tuned = max(1, round(allowed / each)), []
    taken = seconds(
        lambda: tuned.append(FT(steps=steps).repair(run.victim, run.defence, rng=rng).model)
    )
    yield compared(
        run,
        run.scores(run.victim),
        tuned[0],
        {"model": "backdoored", "amount": steps, "seconds": taken},
    )


def images(run: Run) -> Iterator[dict[str, object]]:
    everything, before = run.defence.both, run.scores(run.victim)
    order = interleave(
        everything.labels, len(everything.classes), generator(run.seed, "controls/images")
    )
    for amount in (n for n in run.options.repair_with if n <= len(everything)):
        half = amount // 2
        fewer = DefenceSet(everything.subset(order[:half]), everything.subset(order[half:amount]))
        yield repair(run, run.victim, before, fewer, {"model": "backdoored", "amount": amount})


def shifted(run: Run) -> Iterator[dict[str, object]]:
    rng = generator(run.seed, "controls/shifted")

    def darker(data: ImageSet) -> ImageSet:
        changed = DARKER * data.floats() + NOISE * torch.randn(data.images.shape, generator=rng)
        return ImageSet(to_bytes(changed), data.labels, data.classes)

    yield repair(
        run,
        run.victim,
        run.scores(run.victim),
        DefenceSet(darker(run.defence.train), darker(run.defence.val)),
        {"model": "backdoored", "amount": len(run.defence.both)},
    )


ASK = {
    "benign": benign,
    "relapse": relapse,
    "same_time": same_time,
    "images": images,
    "shifted": shifted,
}


@command(
    "controls",
    Controls,
    outs=(),
    inputs=("model", "twin", "pruned", "defence", "pool", "poisoned", "test", "triggered"),
)
def controls(
    options: Controls,
    *,
    model: Path,
    twin: Path,
    pruned: Path,
    defence: Path,
    pool: Path,
    poisoned: Path,
    test: Path,
    triggered: Path,
    report: Path,
    seed: int,
) -> None:
    """Ask of a finished run what a single repair does not tell; RNP runs with the settings in
    params.yaml.

    benign: RNP on the twin, which was never backdoored. relapse: the repaired model, and the twin
    beside it, are tuned with a few poisoned images among the defender's. same_time: plain
    fine-tuning for as long as RNP takes. images: RNP with fewer images. shifted: RNP with darker,
    noisy ones.
    """
    params, changes = read_params(Path("params.yaml")), load_poisoned(poisoned)[0]
    methods = {
        name: from_section(cls, dict(leaves(params[name])))
        for name, cls in (("unlearn", Unlearn), ("recover", Recover), ("prune", Prune))
    }
    real = ~changes.covers
    run = Run(
        **methods,
        options=options,
        seed=seed,
        twin=load_model(twin)[0],
        victim=load_model(model)[0],
        repaired=load_model(pruned / "model.safetensors")[0],
        defence=load_defence_set(defence),
        poisoned=ImageSet(changes.images[real], changes.labels[real], load_images(pool).classes),
        tests=load_images(test),
        attacked=load_images(triggered / "test"),
        target=read_json(triggered / "attack.json")["target_label"],
    )
    rows = []
    for control in options.ask:
        for row in ASK[control](run):
            rows.append({"control": control, "neurons_pruned": "", **row})
            click.echo(
                f"{control} {row['model']} {row['amount']}: CA {row['clean_accuracy']:.3f}, ASR"
                f" {row['attack_success_rate']:.3f}"
            )
    write_rows(report / "rows.csv", rows)
    kept = (
        "clean_accuracy_before",
        "attack_success_rate_before",
        "clean_accuracy",
        "attack_success_rate",
        "der",
    )
    write_json(
        report / "metrics.json",
        {
            control: {
                f"{row['model']} {row['amount']}": {name: row[name] for name in kept}
                for row in rows
                if row["control"] == control
            }
            for control in options.ask
        },
    )
