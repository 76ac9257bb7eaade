"""Print finished runs as one table."""

from __future__ import annotations

import itertools
from pathlib import Path

import click

from rnp.errors import UserError
from rnp.io.files import read_rows, write_rows
from rnp.reporting.table import (
    GROUP,
    TITLES,
    by_attack,
    from_mlflow,
    kind_of,
    latest_comparable,
    markdown,
    mean_by_group,
    mean_over_seeds,
    read,
)


@click.command()
@click.argument("tables", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option(
    "--csv", "out", type=click.Path(path_type=Path), help="also write the table to this CSV file"
)
@click.option(
    "--by-attack",
    "measure",
    metavar="COLUMN",
    help="print one measure instead, such as attack_success_rate, a column per attack",
)
def table(tables: tuple[Path, ...], out: Path | None, measure: str | None) -> None:
    """Print the table of the runs in TABLES (CSV files of `rnp rows`), or of the rows in MLflow
    when none is named.

    A run counts when it is the newest of its preset, attack, defense and seed, and was made with
    the same settings as the newest of its preset and defense; how many others there are is said
    below the table. A mean over attacks takes in those whose gate passed for every seed. Tables of
    `rnp rows --detection` give a line per task, detector, model and setting instead, those of
    `--controls` one per control, model and amount.
    """
    contents = [read_rows(path) for path in tables]
    kinds = {kind_of(rows) for rows in contents}
    if kinds and None not in kinds:
        if len(kinds) > 1:
            raise UserError("tables of detection and of controls do not go together; name one kind")
        (kind,) = kinds
        found = [*itertools.chain(*contents)]
        lines = mean_by_group(found, kind, kind.group)
        click.echo(
            by_attack(mean_by_group(found, kind, (*kind.group, "attack")), kind.group, measure)
            if measure
            else markdown(lines, [*kind.group, "runs", *kind.words], kind.titles, kind.words)
        )
        if out:
            write_rows(out, lines)
        return
    found = [row for path in tables for row in read(path)] if tables else from_mlflow()
    if not found:
        raise UserError(
            "there is no finished run; run `dvc repro`, or name tables that `rnp rows` wrote"
        )
    fresh = latest_comparable(found)
    lines = mean_over_seeds(fresh)
    click.echo(
        by_attack(lines, GROUP[:2], measure)
        if measure
        else markdown(lines, [*GROUP, "seeds", "gate"], TITLES)
    )
    if len(fresh) < len(found):
        click.echo(
            f"\n{len(found) - len(fresh)} rows left out: older, or made with other settings",
            err=True,
        )
    if out:
        write_rows(out, lines)
