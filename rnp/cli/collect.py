"""Append finished runs to a table of results."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.io.files import upsert_rows
from rnp.params.read import read_params
from rnp.reporting.rows import (
    COLUMNS,
    CONTROL_COLUMNS,
    CONTROL_KEY,
    DETECTION_COLUMNS,
    DETECTION_KEY,
    KEY,
    control_rows,
    detection_rows,
    removal_rows,
    row,
)


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option(
    "--reports", type=click.Path(path_type=Path, exists=True), default="reports", show_default=True
)
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", show_default=True)
@click.option(
    "--defense",
    default="rnp",
    show_default=True,
    help="rnp, another defense of the run, or none: the backdoored model",
)
@click.option(
    "--detection",
    is_flag=True,
    help="what the detectors found instead: a row per task, detector and model",
)
@click.option(
    "--removal",
    is_flag=True,
    help="what the defenses came to, with the unlearned model and without: rows for the same table",
)
@click.option(
    "--controls",
    is_flag=True,
    help="what the controls showed instead: a row per control, model and amount",
)
def rows(
    table: Path,
    reports: Path,
    params: Path,
    defense: str,
    detection: bool,
    removal: bool,
    controls: bool,
) -> None:
    """Put the finished run of this folder into TABLE (a CSV), in place of its older rows there."""
    settings = read_params(params)
    if detection or removal:
        found = [
            *(detection_rows(reports, settings) if detection else ()),
            *(removal_rows(reports, settings) if removal else ()),
        ]
        upsert_rows(table, found, DETECTION_COLUMNS, DETECTION_KEY)
    elif controls:
        upsert_rows(table, control_rows(reports, settings), CONTROL_COLUMNS, CONTROL_KEY)
    else:
        upsert_rows(table, [row(reports, settings, defense)], COLUMNS, KEY)
