"""Measurements of defenses and detectors, on the folder of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from benchmarks.subprocesses import Result
from benchmarks.timing import timed, with_clock
from rnp.clock import Clock
from rnp.defenses.rnp import RNP
from rnp.defenses.rnp_rebuild import RNPRebuild
from rnp.detection.base import Evidence
from rnp.evaluation.metrics import score
from rnp.io.datasets import load_defense_set, load_images
from rnp.io.files import read_json
from rnp.io.history import read_trajectory
from rnp.io.models import load_model
from rnp.models.classifier import Classifier
from rnp.params.fields import from_section
from rnp.params.read import flatten, read_params
from rnp.rebuild import Rebuild
from rnp.registry import load
from rnp.seeds import generator, root
from rnp.training.device import Precision, use_precision
from rnp.training.malloc import keep_freed_pages
from rnp.training.work import WorkCounter, count_pass
from rnp.types import DefenseSet, Epoch, ImageSet
from rnp.unlearn import Unlearn

LEVEL = "0.2"
"""Accuracy of the unlearned checkpoint that sample detectors use."""
STEPS = ("unlearn", "recover", "prune")


@dataclass(frozen=True)
class Subject:
    """A backdoored model, the defender's images and the settings of their run."""

    folder: Path
    params: dict
    model: Classifier
    defense: DefenseSet

    @classmethod
    def load(cls, folder: str) -> Subject:
        path = Path(folder)
        return cls(
            path,
            read_params(path / "params.yaml"),
            load_model(path / "models/backdoored.safetensors")[0],
            load_defense_set(path / "data/defense"),
        )

    @property
    def precision(self) -> Precision:
        return self.params.get("precision", "auto")

    def method(self, kind: type, section: str, prefix: str = "", **changes: object) -> Any:
        """`kind` with the settings of the run, and defaults for those that the run lacks."""
        values = dict(flatten(self.params.get(section, {})))
        values |= {f"{prefix}{name}": value for name, value in changes.items()}
        return from_section(kind, values, prefix)

    def rnp(self) -> RNP:
        """RNP with the settings of the run."""
        kinds = {field.name: type(field.default) for field in dataclasses.fields(RNP)}
        return RNP(**{step: self.method(kinds[step], step) for step in STEPS})

    def rng(self, stage: str) -> torch.Generator:
        return generator(self.params["seed"], stage)

    def tests(self) -> tuple[ImageSet, ImageSet, int | None]:
        """Test images, triggered ones, and the target of the attack."""
        attack = read_json(self.folder / "data/triggered/attack.json")
        tests = load_images(self.folder / "data/test")
        triggered = load_images(self.folder / "data/triggered/test")
        return tests, triggered, attack["target_label"]

    def unlearned(self) -> tuple[nn.Module, list[Epoch]]:
        """The unlearned model of sample detectors, and the trajectory to the collapse.

        Both are made anew where the run has none.
        """
        folder = self.folder / "models/unlearned"
        if folder.exists():
            level = folder / f"accuracy_{LEVEL}.safetensors"
            model = load_model(level if level.exists() else folder / "accuracy_end.safetensors")[0]
            return model, read_trajectory(folder / "trajectory.csv")
        unlearn = self.method(Unlearn, "unlearn", until_collapse=True)
        result = unlearn(self.model, self.defense.train, rng=self.rng("unlearn"))
        result.model.load_state_dict(result.checkpoints.get(LEVEL, result.checkpoints["end"]))
        return result.model, result.trajectory


def rnp_ours(
    folder: str, until_collapse: bool = False, rebuilt: bool = False, precision: str = ""
) -> Result:
    """RNP as the stages run it, then one evaluation, all of which is in `seconds`.

    With `rebuilt` it has the settings of `rnp_rebuild`, whose fourth step follows, against no
    trigger. `precision` is that of the run unless it is given.
    """
    keep_freed_pages()
    subject = Subject.load(folder)
    clock = Clock()
    test, attacked, target = subject.tests()
    chosen = cast("Precision", precision or subject.precision)
    rnp = RNPRebuild() if rebuilt else subject.rnp()
    unlearn = dataclasses.replace(rnp.unlearn, until_collapse=until_collapse)
    steps = {"unlearn": unlearn, "recover": rnp.recover, "prune": rnp.prune}
    method = RNP(**{name: with_clock(step, clock, name) for name, step in steps.items()})

    def defend() -> tuple:
        rng = root(subject.params["seed"])
        result = method.repair(subject.model, subject.defense, rng=rng)
        model = result.model
        if rebuilt:
            neurons = result.pruned.neurons
            with clock("rebuild"):
                model = Rebuild()(subject.model, model, neurons, subject.defense.all, rng=rng)
        with clock("evaluate"):
            scores = score(model, test, attacked, target, precision=chosen)
        return result, scores

    with use_precision(chosen):
        (result, scores), numbers = timed(defend)
        seconds = dict(clock.seconds)
        with WorkCounter() as counter:  # again, since counting takes time
            defend()
        work = counter.work(count_pass(subject.model, test.images))
        before = score(subject.model, test, attacked, target, precision=chosen)
    return numbers | {
        "phases": seconds,
        "unlearn_steps": result.unlearned.trajectory[-1].step,
        "recover_steps": rnp.recover.steps,
        "stopped": result.unlearned.reached,
        "forward_passes": work.forward_passes,
        "backward_passes": work.backward_passes,
        "evaluations": 1,
        "pruned": result.chosen.pruned,
        "evaluation_seconds": seconds["evaluate"],
        "precision": [chosen] * len(seconds),
        "n_defense": len(subject.defense.train),
        "n_clean": len(test),
        "n_triggered": len(attacked),
        **{f"{name}_before": value for name, value in before.flat().items()},
        **scores.flat(),
    }


def defense(folder: str, name: str) -> Result:
    """One defense; RNP goes on to the collapse, as in the pipeline."""
    keep_freed_pages()
    subject = Subject.load(folder)
    if name == "rnp":
        method = subject.rnp()
        rng = root(subject.params["seed"])
    else:
        method = subject.method(load("defense", name), "defenses", f"{name}.")
        rng = subject.rng(f"defend/{name}")
    with use_precision(subject.precision):
        return timed(lambda: method.repair(subject.model, subject.defense, rng=rng))[1]


def detector(folder: str, family: str, name: str, images: int) -> Result:
    """One detector; what label detectors judge by is made before, and not in the seconds."""
    keep_freed_pages()
    subject = Subject.load(folder)
    method = subject.method(load(family, name), "detect", f"{name}.")
    rng = subject.rng(f"{family}/{name}")
    prepare = {"triggers": trigger_work, "samples": sample_work, "labels": label_work}[family]
    with use_precision(subject.precision):
        return timed(prepare(subject, method, rng, images))[1]


Work = Callable[[], object]


def trigger_work(subject: Subject, method: Any, rng: torch.Generator, images: int) -> Work:
    return lambda: method.recover(subject.model, subject.defense.train, rng=rng)


def sample_work(subject: Subject, method: Any, rng: torch.Generator, images: int) -> Work:
    """Score `images` clean and as many triggered images."""
    test, attacked, _ = subject.tests()
    candidates = torch.cat([part.images[:images] for part in (test, attacked)])
    clean = subject.defense.train
    unlearned = subject.unlearned()[0] if method.needs_unlearned else None
    return lambda: method.score(subject.model, candidates, clean, rng=rng, unlearned=unlearned)


def label_work(subject: Subject, method: Any, rng: torch.Generator, images: int) -> Work:
    """Score the evidence: triggers of one step, the unlearned model and its trajectory."""
    family = load("triggers", "neural_cleanse")
    search = subject.method(family, "detect", "neural_cleanse.", steps=1)
    clean = subject.defense.train
    triggers = search.recover(subject.model, clean, rng=rng) if method.needs_triggers else []
    unlearned = subject.unlearned() if method.needs_unlearned else (subject.model, [])
    evidence = Evidence(subject.model, triggers, *unlearned)
    return lambda: method.score_evidence(evidence, clean, rng=rng)
