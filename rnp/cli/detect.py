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
from rnp.cli.detect_stage import detect as stage
from rnp.cli.options import options
from rnp.cli.purify import about_the_subject
from rnp.clock import Clock
from rnp.detection.base import threshold
from rnp.detection.run import Detect, recover_and_detect_labels, score_candidates
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.detection.unlearned import load_checkpoint, unlearned_by_detector
from rnp.io.files import write_rows
from rnp.io.history import read_trajectory
from rnp.io.tensors import save_tensors
from rnp.params.fields import build_from_values
from rnp.registry import Method, load, names
from rnp.reporting.plots import recovered_triggers
from rnp.seeds import generator
from rnp.training.predict import predict
from rnp.unlearn import Unlearn
from rnp.untrusted.audit import AuditCase, prepare
from rnp.untrusted.images import load_images_in_order
from rnp.untrusted.limits import sanitize
from rnp.untrusted.spec import ModelSpec

DEFAULTS = Detect()
MAX_SHOWN = 10  # recovered triggers in the picture, the smallest ones


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
class UnlearnedCase:
    """The model and the images in the form that detectors take, and where the checkpoints of its
    unlearning lie.
    """

    case: AuditCase
    unlearned: Path


@contextlib.contextmanager
def prepare_and_unlearn(
    model: Path, clean: str, seed: int, values: dict[str, object]
) -> Iterator[UnlearnedCase]:
    """Read both and unlearn; what click collected for that is taken out of `values`."""
    subject, unlearn = (
        build_from_values(ModelSpec, values),
        build_from_values(Unlearn, values, "unlearn."),
    )
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        case = prepare(model, clean, subject, seed, work)
        unlearn_stage.unlearn.work(
            unlearn,
            model=work / "models" / "backdoored.safetensors",
            defense=work / "data" / "defense",
            out=work / "unlearned",
            report=work / "report",
            seed=seed,
        )
        yield UnlearnedCase(case, work / "unlearned")


def detector_options(family: str, default: tuple[str, ...]) -> Callable:
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


def selected_detectors(
    family: str, detector_options: tuple[str, ...], values: dict[str, object]
) -> list[Method]:
    methods = {
        name: build_from_values(load(family, name), values, f"{name}.") for name in names(family)
    }
    return [methods[name] for name in detector_options]


@detect.command()
@detector_options("labels", DEFAULTS.labels)
@about_the_subject
def labels(
    model: Path, clean: str, seed: int, detector_options: tuple[str, ...], **values: object
) -> None:
    """Name the label that a backdoor of MODEL would have, by each detector, without and with the
    unlearned model.
    """
    search, methods = (
        build_from_values(NeuralCleanse, values, "search."),
        selected_detectors("labels", detector_options, values),
    )
    with prepare_and_unlearn(model, clean, seed, values) as it:
        train = it.case.defense.train
        nets = {
            "backdoored": it.case.adopted.model,
            "unlearned": load_checkpoint(it.unlearned, DEFAULTS.trigger_checkpoint),
        }
        trajectory = read_trajectory(it.unlearned / "trajectory.csv")
        for name, each in recover_and_detect_labels(
            search, methods, nets, trajectory, train, seed, Clock()
        ).items():
            verdict = each.verdict
            said = (
                "no decision"
                if verdict.label is None
                else f"class {verdict.label} ({train.classes[verdict.label]})"
            )
            click.echo(sanitize(f"{name}: {said}, margin {verdict.margin:.2f}"))
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
    search, subject = (
        build_from_values(NeuralCleanse, values, "search."),
        build_from_values(ModelSpec, values),
    )
    with tempfile.TemporaryDirectory() as folder:
        case = prepare(model, clean, subject, seed, Path(folder))
    data = case.defense.train
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
            for each in found[:MAX_SHOWN]
        ],
    )
    for each in found:
        click.echo(
            sanitize(
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
@detector_options("samples", DEFAULTS.samples)
@about_the_subject
@click.argument("suspects")
def samples(
    model: Path,
    clean: str,
    suspects: str,
    out: Path,
    seed: int,
    detector_options: tuple[str, ...],
    **values: object,
) -> None:
    """Score the images of SUSPECTS, a folder or a table as --clean takes: OUT gets a row per
    image, high = suspicious.

    An image is flagged where its score is above that of all but 5 % of the clean images that the
    unlearning has not seen.
    """
    build_from_values(NeuralCleanse, values, "search.")
    methods = selected_detectors("samples", detector_options, values)
    with prepare_and_unlearn(model, clean, seed, values) as it:
        net, defense = it.case.adopted.model, it.case.defense
        paths, images, skipped = load_images_in_order(suspects, size=defense.train.shape[1])
        rows = [
            {"path": str(path), "predicted": defense.train.classes[label]}
            for path, label in zip(paths, predict(net, images).argmax(1).tolist())
        ]
        weak = unlearned_by_detector(methods, it.unlearned, DEFAULTS.sample_checkpoint)
        for method in methods:
            scores, own = score_candidates(method, net, images, defense, weak[method.name], seed)
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
        click.echo(sanitize(f"warning: skipped {line}"), err=True)
