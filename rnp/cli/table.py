"""Collect finished runs into one table: means over seeds with 95 % intervals, as Markdown or
CSV.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import click

from rnp import tracking
from rnp.cli.rows import (
    COLUMNS,
    CONTROL_COLUMNS,
    DETECTION_COLUMNS,
    MEASURES,
    UNREPAIRED,
    own_stages,
    settings,
)
from rnp.errors import UserError
from rnp.io import read_rows, write_rows
from rnp.registry import suggest

GROUP = ("preset", "defence", "attack")
NUMBERS = (
    *(f"{name}_before" for name in MEASURES[:2]),
    *MEASURES,
    "der",
    "neurons_pruned",
    "seconds",
)
TITLES = {
    "clean_accuracy_before": "CA before",
    "attack_success_rate_before": "ASR before",
    "clean_accuracy": "CA",
    "attack_success_rate": "ASR",
    "robust_accuracy": "RA",
    "der": "DER",
    "neurons_pruned": "pruned",
    "seconds": "seconds",
}
DIGITS = {"neurons_pruned": 0, "seconds": 1}  # behind the point; three elsewhere
Row = dict[str, str]


@dataclass(frozen=True, eq=False)
class Kind:
    """A table of which a line is the mean over the runs that have `group` in common; `titles` are
    those of its measures.
    """

    columns: tuple[str, ...]
    group: tuple[str, ...]
    titles: dict[str, str]

    @property
    def words(self) -> dict[str, str]:
        """Measures that are counted, with their titles."""
        return {"label_correct": "label right"} if "label_correct" in self.columns else {}


KINDS = (
    Kind(
        DETECTION_COLUMNS,
        ("preset", "task", "detector", "model", "setting"),
        {
            "auroc": "AUROC",
            "auprc": "AUPRC",
            "base_rate": "base rate",
            "tpr_at_5_fpr": "TPR at 5 % FPR",
            "fpr": "FPR",
            "fpr_target_class": "FPR, target class",
            "iou": "IoU",
            "l1": "size",
            "attack_success_rate": "ASR",
            "clean_accuracy": "CA",
            "der": "DER",
            "seconds": "seconds",
        },
    ),
    Kind(CONTROL_COLUMNS, ("preset", "control", "model", "amount"), TITLES),
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

    A run counts when it is the newest of its preset, attack, defence and seed, and was made with
    the same settings as the newest of its preset and defence; how many others there are is said
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
        lines = averages(found, kind, kind.group)
        click.echo(
            by_attack(averages(found, kind, (*kind.group, "attack")), kind.group, measure)
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
    fresh = newest(found)
    lines = summarise(fresh)
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


def read(path: Path) -> list[Row]:
    rows = read_rows(path)
    if rows and not set(COLUMNS) <= set(rows[0]):
        raise UserError(
            f"{path} is no table of `rnp rows`: it lacks"
            f" {', '.join(sorted(set(COLUMNS) - set(rows[0])))}"
        )
    return rows


def from_mlflow() -> list[Row]:
    """One row per finished configuration and defence in the MLflow store."""
    rows = []
    for params, metrics, made in tracking.finished_rows():
        attack = params["poison.attack"]
        names = {name.split("/")[2] for name in metrics if name.startswith("evaluate/models/")}
        for defence in sorted(names - UNREPAIRED):
            values = {
                name: metrics[f"evaluate/models/{defence}/{name}"] for name in (*MEASURES, "der")
            }
            values |= {
                f"{name}_before": metrics[f"evaluate/{name}_before"] for name in MEASURES[:2]
            }
            values |= {
                "seconds": sum(metrics[f"time/{stage}"] for stage in own_stages(defence)),
                "neurons_pruned": metrics.get(
                    "evaluate/neurons_pruned" if defence == "rnp" else f"defend/{defence}/pruned"
                ),
            }
            rows.append(
                {name: "" if value is None else f"{value:.5g}" for name, value in values.items()}
                | {
                    "preset": params["preset"],
                    "attack": attack,
                    "defence": defence,
                    "seed": params["seed"],
                    "made": made,
                    "gate": str(bool(metrics["train/gate"])).lower(),
                    "settings": settings(params, attack, defence),
                }
            )
    return rows


def newest(rows: list[Row]) -> list[Row]:
    """Without repetitions, and without rows that other settings made than those of the newest row
    beside them.
    """
    latest = {
        tuple(row[name] for name in (*GROUP, "seed")): row
        for row in sorted(rows, key=lambda row: row["made"])
    }
    shared = {
        (row["preset"], row["defence"]): row["settings"].partition("-")[0]
        for row in latest.values()
    }
    own = {tuple(row[name] for name in GROUP): row["settings"] for row in latest.values()}
    return [
        row
        for row in latest.values()
        if own[tuple(row[name] for name in GROUP)] == row["settings"]
        and shared[row["preset"], row["defence"]] == row["settings"].partition("-")[0]
    ]


def summarise(rows: list[Row]) -> list[dict[str, object]]:
    """A line per preset, defence and attack, and for each preset and defence the mean over the
    attacks that are real.
    """
    rows = sorted(rows, key=lambda row: [row[name] for name in GROUP])
    lines = []
    for (preset, defence), members in itertools.groupby(
        rows, key=lambda row: (row["preset"], row["defence"])
    ):
        real = []
        for attack, some in itertools.groupby(members, key=lambda row: row["attack"]):
            some = list(some)
            passed = sum(row["gate"] == "true" for row in some)
            line = {
                "preset": preset,
                "defence": defence,
                "attack": attack,
                "seeds": len(some),
                "gate": f"{passed} of {len(some)}",
            }
            for name in NUMBERS:
                values = [float(row[name]) for row in some if row[name]]
                line[name], line[f"{name}_interval"] = mean(values), interval(values)
            lines.append(line)
            real += [line] if passed == len(some) else []
        if len(real) > 1:
            average = {
                name: mean([line[name] for line in real if line[name] is not None])
                for name in NUMBERS
            }
            lines.append(
                {
                    "preset": preset,
                    "defence": defence,
                    "attack": f"mean of {len(real)}",
                    "seeds": "",
                    "gate": "",
                }
                | {
                    key: value
                    for name in NUMBERS
                    for key, value in ((name, average[name]), (f"{name}_interval", None))
                }
            )
    return lines


def kind_of(rows: list[Row]) -> Kind | None:
    """None: a table of defences, or none of ours."""
    return next((kind for kind in KINDS if rows and set(kind.columns) <= set(rows[0])), None)


def averages(rows: list[Row], kind: Kind, names: tuple[str, ...]) -> list[dict[str, object]]:
    """Means over the runs whose gate passed, for each of `names`; what is not measured there is
    None.
    """

    def group(row):
        return tuple(row[name] for name in names)

    def order(row):
        return [value.zfill(9) if value.isdigit() else value for value in group(row)]

    lines = []
    for key, some in itertools.groupby(
        sorted((row for row in rows if row["gate"] == "true"), key=order), key=group
    ):
        some = list(some)
        line = dict(zip(names, key)) | {"runs": len(some)}
        for name in kind.words:
            said = [row[name] == "true" for row in some if row[name]]
            line[name] = f"{sum(said)} of {len(said)}" if said else "–"
        for name in kind.titles:
            values = [float(row[name]) for row in some if row[name] not in ("", "nan")]
            line |= {name: mean(values), f"{name}_interval": None}
        lines.append(line)
    return lines


def mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % t-interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def by_attack(lines: list[dict[str, object]], names: tuple[str, ...], measure: str) -> str:
    """One measure as Markdown: a line for each of `names` that has it, a column per attack and,
    where there is one, for their mean.
    """
    if lines and (measure not in lines[0] or measure in (*names, "attack")):
        known = [
            name for name in lines[0] if f"{name}_interval" in lines[0] or name == "label_correct"
        ]
        raise UserError(f"--by-attack: no measure {measure!r}{suggest(measure, known)}")
    attacks = sorted(
        {line["attack"] for line in lines}, key=lambda name: (name.startswith("mean "), name)
    )
    body: dict[tuple, dict[str, str]] = {}
    for line in lines:
        if (text := cell(line, measure)) != "–":
            body.setdefault(tuple(line[name] for name in names), {})[line["attack"]] = text
    return grid(
        [*names, *attacks],
        [[*key, *(cells.get(attack, "–") for attack in attacks)] for key, cells in body.items()],
    )


def markdown(
    lines: list[dict[str, object]],
    words: list[str],
    numbers: dict[str, str],
    titles: dict[str, str] = {},
) -> str:
    """`words` are columns as they are, `numbers` those to round, with their titles; `titles` are
    those of words.
    """
    body = [
        [*(str(line[name]) for name in words), *(cell(line, name) for name in numbers)]
        for line in lines
    ]
    return grid([*(titles.get(name, name) for name in words), *numbers.values()], body)


def grid(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def cell(line: dict[str, object], name: str) -> str:
    value, half = line[name], line.get(f"{name}_interval")
    digits = DIGITS.get(name, 3)
    return (
        "–"
        if value is None
        else (
            value
            if isinstance(value, str)
            else f"{value:.{digits}f}{f' ± {half:.{digits}f}' if half is not None else ''}"
        )
    )
