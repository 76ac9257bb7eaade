"""What a change of the training comes to: `python -m benchmarks.schedules TABLE -S train.epochs=16
-S train.batch_size=128`.

Trains one model with a BadNets backdoor by the settings of a preset and those changes, and adds a
row to the table: CA, ASR, and the processor seconds of the training, which are the same on one
core and on four but for waiting. Run one at a time for each core with `OMP_NUM_THREADS=1`. The
target label is the seed, modulo the classes. `--summary` prints the rows as a Markdown table,
those with the highest CA first, means over seeds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from benchmarks.report import table
from experiments.population import trained
from rnp.errors import UserError
from rnp.io.files import upsert_rows, read_rows
from rnp.params.presets import render
from rnp.params.read import Loader
from rnp.params.schema import check_params
from rnp.reporting.provenance import provenance
from rnp.reporting.rows import format_row
from rnp.sweep.grid import PARAMS, grid
from rnp.training.malloc import keep_freed_pages

COLUMNS = (
    "preset",
    "changes",
    "seed",
    "clean_accuracy",
    "attack_success_rate",
    "core_seconds",
    "n_clean",
    "device",
    "version",
    "torch",
)
KEY = ("preset", "changes", "seed")


def changed(preset: str, changes: Sequence[str], seed: int) -> dict:
    """The parameters of `preset` with `changes`, which are those of `rnp sweep -S` but for one
    point. Raises: UserError.
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
    of = {
        changes: [row for row in rows if row["changes"] == changes]
        for changes in dict.fromkeys(row["changes"] for row in rows)
    }

    def mean(changes, name):
        return statistics.mean(float(row[name]) for row in of[changes])

    body = [
        [
            changes or "none",
            str(len(of[changes])),
            f"{mean(changes, 'clean_accuracy'):.3f}",
            f"{mean(changes, 'attack_success_rate'):.3f}",
            f"{mean(changes, 'core_seconds') / 60:.0f}",
        ]
        for changes in sorted(of, key=lambda changes: -mean(changes, "clean_accuracy"))
    ]
    return table(["changes", "seeds", "CA", "ASR", "core minutes"], body)[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path, help="CSV file that takes the row")
    parser.add_argument("--preset", default="cifar10-fast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "-S",
        "--set",
        action="append",
        default=[],
        dest="changes",
        metavar="NAME=VALUE",
        help="a parameter of the preset",
    )
    parser.add_argument("--summary", action="store_true", help="print the table and train nothing")
    arguments = parser.parse_args()
    if arguments.summary:
        print("\n".join(summary(read_rows(arguments.table))))
        return
    try:
        params = changed(arguments.preset, arguments.changes, arguments.seed)
    except UserError as error:
        parser.error(str(error))
    keep_freed_pages()
    found = trained(params, "badnets")
    row = format_row(
        found.facts
        | provenance()
        | {
            "preset": arguments.preset,
            "changes": " ".join(arguments.changes),
            "seed": arguments.seed,
        },
        COLUMNS,
    )
    upsert_rows(arguments.table, [row], COLUMNS, KEY)
    print(*(f"{name} {value}" for name, value in row.items()), sep=", ")


if __name__ == "__main__":
    main()
