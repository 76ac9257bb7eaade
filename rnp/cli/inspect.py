"""Examine a model of unknown origin with a folder of clean images."""

from __future__ import annotations

from pathlib import Path

from rnp.cli.help import out_option
from rnp.cli.purify import examine
from rnp.cli.untrusted import MLFLOW, Source, untrusted_command
from rnp.untrusted.report import AuditSettings


@untrusted_command((AuditSettings, "", None))
@MLFLOW
@out_option(False, "folder for report.html and report.json", file_okay=False)
def inspect(source: Source, settings: AuditSettings, *, out: Path | None, mlflow: bool) -> None:
    """Examine MODEL with clean images; nothing is changed.

    Prints its accuracy, and the label that a backdoor would have, by several detectors.
    """
    examine(source, settings, out, mlflow)
