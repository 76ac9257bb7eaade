"""Append finished runs to a table of results."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.errors import UserError
from rnp.params.read import read_params
from rnp.reporting.columns import SCHEMAS
from rnp.reporting.rows import collect_rows


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option(
    "--kind",
    type=click.Choice(tuple(SCHEMAS)),
    default="defenses",
    help=(
        "defenses: one row, of a defense; detection: a row per task, detector and model; removal:"
        " a row per defense, for the table of detection; controls: a row per control experiment,"
        " model and amount"
    ),
)
@click.option(
    "--defense",
    default="rnp",
    help="with --kind defenses: rnp, another defense of the run, or none: the backdoored model",
)
@click.option(
    "--reports",
    type=click.Path(path_type=Path, exists=True),
    default="reports",
    help="the report folders of the run",
)
@click.option(
    "--params",
    type=click.Path(path_type=Path),
    default="params.yaml",
    help="the parameters of the run",
)
@click.pass_context
def collect(
    context: click.Context, table: Path, kind: str, defense: str, reports: Path, params: Path
) -> None:
    """Add the rows of a finished run to TABLE, a CSV file; they replace its older rows there."""
    given = context.get_parameter_source("defense") is click.core.ParameterSource.COMMANDLINE
    if given and kind != "defenses":
        raise UserError(f"--defense goes with --kind defenses, not with --kind {kind}")
    collect_rows(table, kind, reports, read_params(params), defense=defense)
