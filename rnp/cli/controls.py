"""What nobody reports: what a repair costs a model without backdoor, how soon the backdoor returns, what fewer images do."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from torch import nn

from rnp.cli.check import check_params, leaves, read_params
from rnp.cli.options import from_section, generator
from rnp.cli.rows import origin, written
from rnp.data.base import interleave
from rnp.defences.ft import FT
from rnp.io import load_defence_set, load_images, load_model, load_poisoned, put_rows, read_json
from rnp.metrics import Scores, defence_effectiveness, score
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.types import DefenceSet, ImageSet, to_bytes
from rnp.unlearn import Unlearn

KEY = ("preset", "attack", "seed", "control", "model", "amount")
COLUMNS = (*KEY, "gate", "clean_accuracy_before", "attack_success_rate_before", "clean_accuracy", "attack_success_rate",
           "robust_accuracy", "der", "neurons_pruned", "seconds", "n_clean", "n_triggered", "device", "torch", "settings", "made")
POISONED = (1, 5, 10, 50)
IMAGES = (500, 250, 100, 50, 10)
NOISE, DARKER = 0.05, 0.7  # of the shifted images, in full scale
RELAPSE = FT(lr=0.01, steps=100)


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run, as its stages left it."""

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
        """The method as the stages run it: the repaired copy, and how many neurons it lost."""
        unlearned = self.unlearn(model, defence.train, rng=generator(self.seed, "unlearn")).model
        mask = self.recover(unlearned, defence.train, rng=generator(self.seed, "recover")).mask
        pruned = self.prune(model, mask, defence.both)
        return pruned.model, pruned.chosen.pruned


def load_run(params: dict) -> Run:
    """Raises: UserError when a stage has not run."""
    methods = {name: from_section(cls, dict(leaves(params[name])))
               for name, cls in (("unlearn", Unlearn), ("recover", Recover), ("prune", Prune))}
    pool, changes = load_images(Path("data/pool")), load_poisoned(Path("data/poisoned"))[0]
    real = ~changes.covers
    return Run(**methods, seed=params["seed"], twin=load_model(Path("models/twin.safetensors"))[0],
               victim=load_model(Path("models/backdoored.safetensors"))[0],
               repaired=load_model(Path("models/pruned/model.safetensors"))[0], defence=load_defence_set(Path("data/defence")),
               poisoned=ImageSet(changes.images[real], changes.labels[real], pool.classes), tests=load_images(Path("data/test")),
               attacked=load_images(Path("data/triggered/test")),
               target=read_json(Path("data/triggered/attack.json"))["target_label"])


def compared(run: Run, before: Scores, after: nn.Module, about: dict[str, object]) -> dict[str, object]:
    """A row: a model on the test images, beside what it came from."""
    new = run.scores(after)
    return about | {f"{name}_before": value for name, value in before.flat().items()} | new.flat() | {
        "der": defence_effectiveness(before, new)}


def repair(run: Run, model: nn.Module, before: Scores, defence: DefenceSet, about: dict[str, object]) -> dict[str, object]:
    start = time.perf_counter()
    repaired, pruned = run.rnp(model, defence)
    seconds = time.perf_counter() - start
    return compared(run, before, repaired, about | {"neurons_pruned": pruned, "seconds": seconds})


def benign(run: Run) -> Iterator[dict[str, object]]:
    yield repair(run, run.twin, run.scores(run.twin), run.defence, {"model": "twin", "amount": len(run.defence.both)})


def relapse(run: Run) -> Iterator[dict[str, object]]:
    """Would a model that never held the backdoor learn it as fast? Then its return says nothing about what was left."""
    for model, net in (("repaired", run.repaired), ("twin", run.twin)):
        before = run.scores(net)
        for amount in (n for n in POISONED if n <= len(run.poisoned)):
            few = run.poisoned.subset(torch.randperm(len(run.poisoned), generator=generator(run.seed, "controls/poisoned"))[:amount])
            mixed = DefenceSet(DefenceSet(run.defence.train, few).both, run.defence.val)
            start = time.perf_counter()
            tuned = RELAPSE.repair(net, mixed, rng=generator(run.seed, "controls/relapse")).model
            seconds = time.perf_counter() - start
            yield compared(run, before, tuned, {"model": model, "amount": amount, "seconds": seconds})


def images(run: Run) -> Iterator[dict[str, object]]:
    everything, before = run.defence.both, run.scores(run.victim)
    order = interleave(everything.labels, len(everything.classes), generator(run.seed, "controls/images"))
    for amount in (n for n in IMAGES if n <= len(everything)):
        half = amount // 2
        fewer = DefenceSet(everything.subset(order[:half]), everything.subset(order[half:amount]))
        yield repair(run, run.victim, before, fewer, {"model": "backdoored", "amount": amount})


def shifted(run: Run) -> Iterator[dict[str, object]]:
    rng = generator(run.seed, "controls/shifted")

    def darker(data: ImageSet) -> ImageSet:
        changed = DARKER * data.floats() + NOISE * torch.randn(data.images.shape, generator=rng)
        return ImageSet(to_bytes(changed), data.labels, data.classes)

    yield repair(run, run.victim, run.scores(run.victim), DefenceSet(darker(run.defence.train), darker(run.defence.val)),
                 {"model": "backdoored", "amount": len(run.defence.both)})


RUN = {"benign": benign, "relapse": relapse, "images": images, "shifted": shifted}


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--only", multiple=True, type=click.Choice(list(RUN)), help="these controls alone; may be given again")
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", show_default=True)
def controls(table: Path, only: tuple[str, ...], params: Path) -> None:
    """Run the controls of the finished run of this folder and put their rows into TABLE (a CSV), in place of older ones.

    benign: RNP on the twin, which was never backdoored. relapse: the repaired model, and the twin beside it, are tuned with
    1 to 50 poisoned images among the defender's. images: RNP with fewer images. shifted: RNP with darker, noisy ones.
    """
    given = read_params(params)
    check_params(given)
    run, gate = load_run(given), read_json(Path("data/triggered/attack.json"))["gate"]
    common = {
        "preset": given["preset"], "attack": given["poison"]["attack"], "seed": run.seed, "gate": str(gate).lower(),
        "n_clean": len(run.tests), "n_triggered": len(run.attacked), **origin(dict(leaves(given)), "rnp"),
    }
    for control in only or RUN:
        for row in RUN[control](run):
            put_rows(table, [written(common | {"control": control} | row, COLUMNS)], COLUMNS, KEY)  # as they come: it is long
            click.echo(f"{control} {row['model']} {row['amount']}: CA {row['clean_accuracy']:.3f}, ASR {row['attack_success_rate']:.3f}")
