"""Detect a backdoor in a model of unknown origin: its target label, its trigger, its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click

from rnp.cli.detect_stage import detect as stage
from rnp.cli.help import out_option
from rnp.cli.untrusted import Source, untrusted_command, warn
from rnp.detection.base import LabelDetector, SampleDetector
from rnp.detection.run import Detect, skipped_label_detectors
from rnp.detection.triggers.neural_cleanse import QUICK, NeuralCleanse
from rnp.io.files import write_rows
from rnp.registry import Method, load, names
from rnp.unlearn import Unlearn
from rnp.untrusted.case import unlearn_model
from rnp.untrusted.detection import recover_triggers, score_suspects, search_and_detect_labels
from rnp.untrusted.limits import sanitize
from rnp.untrusted.report import HINT, describe_verdict

M = TypeVar("M", bound=Method)
DEFAULTS = Detect()
UNLEARN_PART = (Unlearn, "unlearn.", None)
SEARCH_PART = (NeuralCleanse, "search.", QUICK)


class DetectGroup(click.Group):
    """Options without a sub-command are those of the pipeline's stage."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["stage", *args]
        return super().parse_args(ctx, args)


def detector_parts(family: str) -> list[tuple[type, str, object]]:
    """The options of every detector of a family, for `untrusted_command`."""
    return [(load(family, name), f"{name}.", None) for name in names(family)]


def detector_headings(family: str) -> dict[str, Sequence[str]]:
    return {f"Detector {name}": (f"{name.replace('_', '-')}.",) for name in names(family)}


def detector_option(family: str, default: tuple[str, ...]) -> Callable:
    return click.option(
        "--detector",
        "chosen",
        multiple=True,
        type=click.Choice(names(family)),
        default=default,
        show_default=True,
        metavar="NAME",
        help=f"detector to run, may be repeated: {', '.join(names(family))}",
    )


def select(methods: Sequence[M], chosen: Sequence[str]) -> list[M]:
    """The methods of the chosen names, in the order of the names."""
    by_name = {method.name: method for method in methods}
    return [by_name[name] for name in chosen]


@untrusted_command(
    UNLEARN_PART, SEARCH_PART, *detector_parts("labels"), headings=detector_headings("labels")
)
@detector_option("labels", DEFAULTS.labels)
def labels(
    source: Source,
    unlearn: Unlearn,
    search: NeuralCleanse,
    *methods: LabelDetector,
    chosen: tuple[str, ...],
) -> None:
    """Predict the target label of a backdoor in MODEL, by several detectors.

    A name that ends in `_unlearned` is that of a detector on the unlearned model.
    """
    case = source.load()
    detectors = select(methods, chosen)
    for sentence in skipped_label_detectors(detectors, case.loaded.model, len(case.classes)):
        warn(sentence)
    unlearned = unlearn_model(case, unlearn)
    verdicts = search_and_detect_labels(case, unlearned, detectors, search)
    for name, verdict in verdicts.items():
        click.echo(sanitize(f"{name}: {describe_verdict(name, verdict, case.classes)}"))
    click.echo(HINT)


@untrusted_command(SEARCH_PART)
@out_option(True, "folder for the triggers", file_okay=False)
def triggers(source: Source, search: NeuralCleanse, *, out: Path) -> None:
    """Recover the smallest trigger of each label of MODEL.

    OUT gets triggers.safetensors, triggers.csv and triggers.png. Triggers are recovered from MODEL
    only; those recovered from its unlearned copy were smaller and changed fewer predictions.
    """
    from rnp.untrusted.files import write_triggers  # loads the figures

    case = source.load()
    recovered = recover_triggers(case, search)
    write_triggers(recovered, case.classes, out)
    for trigger in sorted(recovered, key=lambda trigger: trigger.l1):
        click.echo(
            sanitize(
                f"class {trigger.label} ({case.classes[trigger.label]}): {trigger.l1:.1f} pixels;"
                f" predicted for {trigger.success:.3f} of the other images with the trigger,"
                f" {trigger.baseline:.3f} without"
            )
        )


@untrusted_command(
    UNLEARN_PART,
    *detector_parts("samples"),
    headings=detector_headings("samples"),
    arguments={"suspects": "the images to score: a folder, or a .csv or .parquet file of paths"},
)
@detector_option("samples", DEFAULTS.samples)
@out_option(True, "CSV file for the scores", dir_okay=False)
@click.argument("suspects")
def samples(
    source: Source,
    unlearn: Unlearn,
    *methods: SampleDetector,
    suspects: str,
    out: Path,
    chosen: tuple[str, ...],
) -> None:
    """Find images among SUSPECTS that carry a trigger of MODEL.

    OUT gets a row per image with the score of each detector, high = suspicious. An image is
    flagged if its score is above that of 95 % of the clean images that the unlearning has not
    seen.
    """
    case = source.load()
    unlearned = unlearn_model(case, unlearn)
    scored = score_suspects(case, unlearned, select(methods, chosen), suspects)
    write_rows(out, scored.rows())
    for name, results in scored.by_detector.items():
        flagged = int(results.flagged.sum())
        click.echo(f"{name}: {flagged} of {len(scored.paths)} images flagged")
    for line in scored.skipped:
        warn(f"skipped {line}")


@click.group(cls=DetectGroup)
def detect() -> None:
    """Detect a backdoor in a model of unknown origin, or run the detectors of the pipeline."""


for command in (labels, triggers, samples):
    detect.add_command(command)
detect.add_command(stage, "stage")
