"""The rows of an experiment's table."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from rnp.io.files import upsert_rows
from rnp.reporting.columns import format_row
from rnp.reporting.provenance import provenance


def add_row(
    table: Path, values: dict[str, object], columns: Sequence[str], key: Sequence[str]
) -> None:
    """Add a row to the table, with machine, versions and time, and print it.

    It replaces the row with the same values of `key`.
    """
    made = {"made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}"}
    row = format_row(values | provenance() | made, columns)
    upsert_rows(table, [row], columns, key)
    shown = (f"{column} {row[column]}" for column in columns if row[column] != "")
    print(*shown, sep=", ", flush=True)
