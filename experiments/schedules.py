"""How a change of the training changes the model: `python -m experiments.schedules TABLE -S
train.epochs=16 -S train.batch_size=128`.

Trains one model with a BadNets backdoor by the settings of a preset and those changes, and adds a
row to the table: CA, ASR, and the processor seconds of the training, which hardly depend on the
number of cores. Run one at a time for each core with `OMP_NUM_THREADS=1`. The target label is the
seed, modulo the classes. `--summary` prints the rows as a Markdown table, those with the highest CA
first, means over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.report import table
from experiments.population import train_backdoored
from rnp.errors import UserError
from rnp.io.files import read_rows, upsert_rows
from rnp.params.presets import render
from rnp.params.read import Loader
from rnp.params.schema import check_params
from rnp.reporting.columns import format_row
from rnp.reporting.provenance import provenance
from rnp.sweep.grid import PARAMS, grid
from rnp.training.malloc import keep_freed_pages

KEY = ("preset", "changes", "seed")
COLUMNS = (
    *KEY,
    "clean_accuracy",
    "attack_success_rate",
    "core_seconds",
    "n_clean",
    "device",
    "version",
    "torch",
)


def changed(preset: str, changes: Sequence[str], seed: int) -> dict:
    """The parameters of `preset` with `changes`, which are those of `rnp sweep -S` for one point.

    Raises: UserError for several points, and for changes that no command takes.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, PARAMS)
        file.write_text(render(preset))
        texts = list(grid([*changes, f"seed={seed}"], file).values())
    if len(texts) > 1:
        raise UserError("-S: one value for each parameter; a run trains one model")
    params = yaml.load(texts[0], Loader)
    check_params(params)
    return params


def summary(rows: Sequence[dict[str, str]]) -> list[str]:
    """A line of a Markdown table for each set of changes."""
    by_changes: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_changes.setdefault(row["changes"], []).append(row)

    def mean(changes: str, column: str) -> float:
        return statistics.mean(float(row[column]) for row in by_changes[changes])

    body = [
        [
            changes or "none",
            str(len(by_changes[changes])),
            f"{mean(changes, 'clean_accuracy'):.3f}",
            f"{mean(changes, 'attack_success_rate'):.3f}",
            f"{mean(changes, 'core_seconds') / 60:.0f}",
        ]
        for changes in sorted(by_changes, key=lambda changes: -mean(changes, "clean_accuracy"))
    ]
    return table(["changes", "seeds", "CA", "ASR", "core minutes"], body)[:-1]


def main() -> None:
    parser = argument_parser()
    arguments = parser.parse_args()
    if arguments.summary:
        print("\n".join(summary(read_rows(arguments.table))))
        return
    try:
        params = changed(arguments.preset, arguments.changes, arguments.seed)
    except UserError as error:
        parser.error(str(error))
    keep_freed_pages()
    identity = (arguments.preset, " ".join(arguments.changes), arguments.seed)
    columns = train_backdoored(params, "badnets").columns
    row = format_row(columns | provenance() | dict(zip(KEY, identity)), COLUMNS)
    upsert_rows(arguments.table, [row], COLUMNS, KEY)
    print(*(f"{name} {value}" for name, value in row.items()), sep=", ")


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("table", type=Path, help="CSV file that takes the row")
    add("--preset", default="cifar10-fast")
    add("--seed", type=int, default=0)
    add("-S", "--set", action="append", default=[], dest="changes", metavar="NAME=VALUE")
    add("--summary", action="store_true", help="print the table and train nothing")
    return parser


if __name__ == "__main__":
    main()
