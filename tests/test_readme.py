"""The tables of the README are what `rnp table` prints of the rows in `results/`."""

import itertools
from pathlib import Path

from click.testing import CliRunner

from rnp.cli.main import cli

ROOT = Path(__file__).parents[1]
MEASURES = ("attack_success_rate", "clean_accuracy", "robust_accuracy", "der", "label_correct", "auroc", "l1", "seconds")


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_no_row_is_stale():
    printed = set()
    for path, measure in itertools.product(sorted(ROOT.glob("results/*/*.csv")), (None, *MEASURES)):
        done = CliRunner().invoke(cli, ["table", str(path), *(["--by-attack", measure] if measure else [])])
        printed |= {tuple(cells(line)) for line in done.output.splitlines()}
    presets = tuple(f"| {path.name} |" for path in ROOT.glob("results/*/"))
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(presets)]
    assert len(shown) > 10 and not [line for line in shown if tuple(cells(line)) not in printed]
