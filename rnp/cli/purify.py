"""Repair a model of unknown origin with a folder of clean images."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.cli.help import out_option
from rnp.cli.untrusted import MLFLOW, Source, typed_command, untrusted_command, warn
from rnp.reporting.progress import progress
from rnp.untrusted.audit import audit
from rnp.untrusted.limits import sanitize
from rnp.untrusted.report import AuditSettings, RepairSettings, summarize


@untrusted_command((RepairSettings, "", None))
@MLFLOW
@out_option(True, "folder for the repaired model and the report", file_okay=False)
def purify(source: Source, settings: RepairSettings, *, out: Path, mlflow: bool) -> None:
    """Repair MODEL with clean images alone.

    MODEL is unlearned, recovered and pruned, then rebuilt against the triggers that work. OUT
    gets purified.safetensors, report.html, report.json, modelcard.md and masks.csv. The file MODEL
    is read as `rnp convert` reads it, and never changed.
    """
    examine(source, settings, out, mlflow)
    click.echo(
        f"wrote {sanitize(str(out / 'purified.safetensors'))} and"
        f" {sanitize(str(out / 'report.html'))}, which says what was not tested"
    )


def examine(source: Source, settings: AuditSettings, out: Path | None, mlflow: bool) -> None:
    """Audit the model, write the report if there is a folder for it, and print a summary."""
    from rnp.untrusted.files import log_to_mlflow, write_reports  # loads the figures

    case = source.load()
    with progress("rnp", None) as on_epoch:
        report = audit(case, settings, on_epoch)
    for warning in report.warnings[len(case.warnings) :]:
        warn(warning)
    if out:
        write_reports(report, out, typed_command())
    if mlflow:
        log_to_mlflow(report, out)
    for line in summarize(report):
        click.echo(sanitize(line))
