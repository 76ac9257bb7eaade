"""Print finished runs as one table."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.io.files import write_rows
from rnp.reporting.table import summarize


@click.command()
@click.argument("tables", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--measure",
    metavar="COLUMN",
    help="print one measure, such as attack_success_rate, with a column per attack",
)
@click.option(
    "--csv", "out", type=click.Path(path_type=Path), help="also write the table to this CSV file"
)
def table(tables: tuple[Path, ...], out: Path | None, measure: str | None) -> None:
    """Print the means over the runs in TABLES, CSV files of `rnp collect`; without TABLES over the
    rows in MLflow.

    A run counts when it is the latest of its preset, attack, defense and seed, and was made with
    the same settings as the latest of its preset and defense; a note says how many others there
    are. A mean over attacks includes those whose gate passed for every seed. Tables of detection
    give a line per task, detector, model and setting instead, those of controls one per control,
    model and amount.
    """
    summary = summarize(tables)
    click.echo(summary.markdown(measure))
    if summary.left_out:
        note = f"{summary.left_out} rows left out: older, or made with other settings"
        click.echo(f"\n{note}", err=True)
    if out:
        write_rows(out, summary.lines)
