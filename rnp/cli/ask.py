"""Ask the detectors of a stranger's model: which label a backdoor would have, by which trigger,
and in which images.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from rnp.cli import unlearn as unlearn_stage
from rnp.cli.detect import Clock, Detect, searched_and_labelled
from rnp.cli.detect import detect as stage
from rnp.cli.examination import Case, Subject, prepare
from rnp.cli.options import build, generator, options
from rnp.cli.purify import about_the_subject
from rnp.cli.screening import ask, checkpoint, consulted
from rnp.detection.base import threshold
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.io import read_trajectory, save_tensors, write_rows
from rnp.plots import recovered_triggers
from rnp.quarantine import printable
from rnp.registry import Method, load, names
from rnp.strangers import in_order
from rnp.training import predict
from rnp.unlearn import Unlearn

DEFAULTS = Detect()
SHOWN = 10  # recovered triggers in the picture, the smallest ones


class Detection(click.Group):
    """With options alone this is the stage of the pipeline."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        if (
            arguments
            and arguments[0].startswith("-")
            and arguments[0] not in context.help_option_names
        ):
            arguments = ["stage", *arguments]
        return super().parse_args(context, arguments)


@click.group(cls=Detection)
def detect() -> None:
    """Recover triggers, name the target label, find triggered images: of a stranger's model, or as
    a stage.
    """


detect.add_command(stage, "stage")


@dataclass(frozen=True)
class Asked:
    """The model and the images in the form that detectors take, and where the checkpoints of its
    unlearning lie.
    """

    case: Case
    unlearned: Path


@contextlib.contextmanager
def asked(model: Path, clean: str, seed: int, values: dict[str, object]) -> Iterator[Asked]:
    """Read both and unlearn; what click collected for that is taken out of `values`."""
    subject, unlearn = build(Subject, values), build(Unlearn, values, "unlearn.")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        case = prepare(model, clean, subject, seed, work)
        unlearn_stage.unlearn.work(
            unlearn,
            model=work / "models" / "backdoored.safetensors",
            defence=work / "data" / "defence",
            out=work / "unlearned",
            report=work / "report",
            seed=seed,
        )
        yield Asked(case, work / "unlearned")


def by(family: str, default: tuple[str, ...]) -> Callable:
    """Options that choose the detectors of a family, and those of each."""

    def decorate(function: Callable) -> Callable:
        for name in reversed(names(family)):
            function = options(load(family, name), f"{name}.")(function)
        return click.option(
            "--by",
            multiple=True,
            type=click.Choice(names(family)),
            default=default,
            show_default=True,
            help="detector to ask; may be repeated",
        )(function)

    return decorate


def chosen(family: str, by: tuple[str, ...], values: dict[str, object]) -> list[Method]:
    methods = {name: build(load(family, name), values, f"{name}.") for name in names(family)}
    return [methods[name] for name in by]


@detect.command()
@by("labels", DEFAULTS.labels)
@about_the_subject
def labels(model: Path, clean: str, seed: int, by: tuple[str, ...], **values: object) -> None:
    """Name the label that a backdoor of MODEL would have, by each detector, without and with the
    unlearned model.
    """
    search, methods = build(NeuralCleanse, values, "search."), chosen("labels", by, values)
    with asked(model, clean, seed, values) as it:
        train = it.case.defence.train
        nets = {
            "backdoored": it.case.adopted.model,
            "unlearned": checkpoint(it.unlearned, DEFAULTS.trigger_model),
        }
        trajectory = read_trajectory(it.unlearned / "trajectory.csv")
        for name, each in searched_and_labelled(
            search, methods, nets, trajectory, train, seed, Clock()
        ).items():
            verdict = each.verdict
            said = (
                "no decision"
                if verdict.label is None
                else f"class {verdict.label} ({train.classes[verdict.label]})"
            )
            click.echo(printable(f"{name}: {said}, margin {verdict.margin:.2f}"))
    click.echo("a benign model drifts to some class too: a label named is a hint, not a proof")


@detect.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="folder for the triggers",
)
@about_the_subject
def triggers(model: Path, clean: str, out: Path, seed: int, **values: object) -> None:
    """Recover the smallest trigger of each label of MODEL: OUT gets triggers.safetensors,
    triggers.csv and triggers.png.

    They are asked of MODEL alone: asked of the unlearned one they were smaller and fooled MODEL
    less.
    """
    search, subject = build(NeuralCleanse, values, "search."), build(Subject, values)
    with tempfile.TemporaryDirectory() as folder:
        case = prepare(model, clean, subject, seed, Path(folder))
    data = case.defence.train
    found = search.recover(case.adopted.model, data, rng=generator(seed, "triggers/backdoored"))
    save_tensors(
        out / "triggers.safetensors",
        {
            part: torch.stack([getattr(each, part) for each in found])
            for part in ("mask", "pattern")
        },
        {"kind": "recovered triggers"},
    )
    found = sorted(found, key=lambda trigger: trigger.l1)
    write_rows(
        out / "triggers.csv",
        [
            {
                "label": each.label,
                "class": data.classes[each.label],
                "l1": f"{each.l1:.5g}",
                "success": f"{each.success:.5g}",
                "baseline": f"{each.baseline:.5g}",
                "gain": f"{each.gain:.5g}",
            }
            for each in found
        ],
    )
    recovered_triggers(
        out / "triggers.png",
        None,
        [
            (f"class {data.classes[each.label]}, {each.l1:.1f} pixels", each.pattern, each.mask)
            for each in found[:SHOWN]
        ],
    )
    for each in found:
        click.echo(
            printable(
                f"class {each.label} ({data.classes[each.label]}): {each.l1:.1f} pixels move"
                f" {each.success:.3f} of the images, {each.baseline:.3f} go there without"
            )
        )


@detect.command()
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="CSV file for the scores",
)
@by("samples", DEFAULTS.samples)
@about_the_subject
@click.argument("suspects")
def samples(
    model: Path,
    clean: str,
    suspects: str,
    out: Path,
    seed: int,
    by: tuple[str, ...],
    **values: object,
) -> None:
    """Score the images of SUSPECTS, a folder or a table as --clean takes: OUT gets a row per
    image, high = suspicious.

    An image is flagged where its score is above that of all but 5 % of the clean images that the
    unlearning has not seen.
    """
    build(NeuralCleanse, values, "search.")
    methods = chosen("samples", by, values)
    with asked(model, clean, seed, values) as it:
        net, defence = it.case.adopted.model, it.case.defence
        paths, images, skipped = in_order(suspects, size=defence.train.shape[1])
        rows = [
            {"path": str(path), "predicted": defence.train.classes[label]}
            for path, label in zip(paths, predict(net, images).argmax(1).tolist())
        ]
        weak = consulted(methods, it.unlearned, DEFAULTS.sample_model)
        for method in methods:
            scores, own = ask(method, net, images, defence, weak[method.name], seed)
            limit = threshold(own)
            for row, score in zip(rows, scores.tolist()):
                row |= {
                    method.name: f"{score:.6g}",
                    f"{method.name}_flagged": str(score > limit).lower(),
                }
            click.echo(
                f"{method.name}: {int((scores > limit).sum())} of {len(rows)} images flagged"
            )
        write_rows(out, rows)
    for line in skipped:
        click.echo(printable(f"warning: skipped {line}"), err=True)
