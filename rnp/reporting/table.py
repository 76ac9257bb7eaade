"""Means over finished runs, with 95 % intervals, as Markdown or CSV."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rnp.errors import UserError
from rnp.io.files import read_rows
from rnp.registry import suggest
from rnp.reporting.columns import COLUMNS, CONTROL_COLUMNS, DETECTION_COLUMNS, MEASURES
from rnp.reporting.rows import REFERENCE_MODELS, settings_digest, stages_of_defense
from rnp.tracking.store import finished_rows

GROUP = ("preset", "defense", "attack")
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
DIGITS = {"neurons_pruned": 0, "seconds": 1}
"""After the decimal point; three for all others."""
ABSENT = "–"
Row = dict[str, str]
Line = dict[str, object]
"""A line of means: a number and its `_interval` per measure."""


@dataclass(frozen=True, eq=False)
class TableKind:
    """A table whose lines are means over the runs that have `group` in common.

    `titles` are those of the measures, `counts` those of columns of which the true ones count.
    """

    columns: tuple[str, ...]
    group: tuple[str, ...]
    titles: dict[str, str]
    counts: dict[str, str] = field(default_factory=dict)


KINDS = (
    TableKind(
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
        {"label_correct": "label right"},
    ),
    TableKind(CONTROL_COLUMNS, ("preset", "control", "model", "amount"), TITLES),
)


@dataclass(frozen=True)
class Summary:
    """The lines of a table, and what is printed of them.

    `names` are the columns that identify a line but for the attack, `texts` the columns that are
    printed as they are, with their titles, and `measures` the numbers, with theirs. `left_out`
    rows are older than others, or were made with other settings.
    """

    lines: list[Line]
    by_attack: list[Line]
    names: tuple[str, ...]
    texts: dict[str, str]
    measures: dict[str, str]
    left_out: int = 0

    def markdown(self, measure: str | None = None) -> str:
        """All measures, or one of them with a column per attack."""
        if measure is not None:
            return one_measure(self.by_attack, self.names, measure)
        body = [
            [
                *(str(line[name]) for name in self.texts),
                *(cell(line, name) for name in self.measures),
            ]
            for line in self.lines
        ]
        return grid([*self.texts.values(), *self.measures.values()], body)


def summarize(tables: Sequence[Path]) -> Summary:
    """The means over the runs in tables of `rnp collect`; without tables over the rows in MLflow.

    Raises: UserError when there is no run, or tables are of different kinds.
    """
    contents = [read_rows(path) for path in tables]
    table_kinds = [kind_of(rows) for rows in contents]
    kinds = {kind for kind in table_kinds if kind is not None}
    if kinds and None not in table_kinds:
        if len(kinds) > 1:
            raise UserError("tables of detection and of controls cannot be combined; name one kind")
        return summarize_kind([*itertools.chain(*contents)], kinds.pop())
    rows = [row for path in tables for row in read(path)] if tables else from_mlflow()
    if not rows:
        raise UserError(
            "there is no finished run; run `dvc repro`, or name tables that `rnp collect` wrote"
        )
    return summarize_defenses(rows)


def summarize_kind(rows: list[Row], kind: TableKind) -> Summary:
    shown = (*kind.group, "runs")
    return Summary(
        lines=mean_by_group(rows, kind, kind.group),
        by_attack=mean_by_group(rows, kind, (*kind.group, "attack")),
        names=kind.group,
        texts=dict(zip(shown, shown)) | kind.counts,
        measures=kind.titles,
    )


def summarize_defenses(rows: list[Row]) -> Summary:
    current = latest_comparable(rows)
    lines = mean_over_seeds(current)
    shown = (*GROUP, "seeds", "gate")
    return Summary(
        lines=lines,
        by_attack=lines,
        names=GROUP[:2],
        texts=dict(zip(shown, shown)),
        measures=TITLES,
        left_out=len(rows) - len(current),
    )


def kind_of(rows: list[Row]) -> TableKind | None:
    """The kind of a table; None for one of defenses, or of no kind of ours."""
    return next((kind for kind in KINDS if rows and set(kind.columns) <= set(rows[0])), None)


def read(path: Path) -> list[Row]:
    """Raises: UserError when the file is no table of defenses."""
    rows = read_rows(path)
    if rows and (missing := sorted(set(COLUMNS) - set(rows[0]))):
        raise UserError(f"{path} is no table of `rnp collect`: it lacks {', '.join(missing)}")
    return rows


def from_mlflow() -> list[Row]:
    """One row per finished configuration and defense in the MLflow store."""
    rows = []
    for params, metrics, made in finished_rows():
        models = {name.split("/")[2] for name in metrics if name.startswith("evaluate/models/")}
        for defense in sorted(models - REFERENCE_MODELS):
            values = mlflow_values(metrics, defense)
            row = {name: "" if value is None else f"{value:.5g}" for name, value in values.items()}
            rows.append(
                row
                | {
                    "preset": params["preset"],
                    "attack": params["poison.attack"],
                    "defense": defense,
                    "seed": params["seed"],
                    "made": made,
                    "gate": str(bool(metrics["train/gate"])).lower(),
                    "settings": settings_digest(dict(params), params["poison.attack"], defense),
                }
            )
    return rows


def mlflow_values(metrics: dict[str, float], defense: str) -> dict[str, float | None]:
    """The numbers of a row, from the metrics of a configuration."""
    pruned = "evaluate/neurons_pruned" if defense == "rnp" else f"defend/{defense}/pruned"
    return {
        **{name: metrics[f"evaluate/models/{defense}/{name}"] for name in (*MEASURES, "der")},
        **{f"{name}_before": metrics[f"evaluate/{name}_before"] for name in MEASURES[:2]},
        "seconds": sum(metrics[f"time/{stage}"] for stage in stages_of_defense(defense)),
        "neurons_pruned": metrics.get(pruned),
    }


def latest_comparable(rows: list[Row]) -> list[Row]:
    """The latest row of each run, without those of other settings than the latest ones."""
    latest = {
        tuple(row[name] for name in (*GROUP, "seed")): row
        for row in sorted(rows, key=lambda row: row["made"])
    }
    shared = {
        (row["preset"], row["defense"]): row["settings"].partition("-")[0]
        for row in latest.values()
    }
    own = {tuple(row[name] for name in GROUP): row["settings"] for row in latest.values()}
    return [
        row
        for row in latest.values()
        if own[tuple(row[name] for name in GROUP)] == row["settings"]
        and shared[row["preset"], row["defense"]] == row["settings"].partition("-")[0]
    ]


def mean_over_seeds(rows: list[Row]) -> list[Line]:
    """A line per preset, defense and attack, then the mean over the attacks that are real."""
    rows = sorted(rows, key=lambda row: [row[name] for name in GROUP])
    lines: list[Line] = []
    for _, of_defense in itertools.groupby(rows, key=lambda row: (row["preset"], row["defense"])):
        real = []
        for _, of_attack in itertools.groupby(of_defense, key=lambda row: row["attack"]):
            runs = list(of_attack)
            line = attack_line(runs)
            lines.append(line)
            if all(row["gate"] == "true" for row in runs):
                real.append(line)
        if len(real) > 1:
            lines.append(mean_line(real))
    return lines


def attack_line(runs: list[Row]) -> Line:
    """The means over the seeds of one preset, defense and attack."""
    passed = sum(row["gate"] == "true" for row in runs)
    line: Line = {name: runs[0][name] for name in GROUP}
    line |= {"seeds": len(runs), "gate": f"{passed} of {len(runs)}"}
    for name in TITLES:
        values = [float(row[name]) for row in runs if row[name]]
        line |= {name: mean(values), f"{name}_interval": interval(values)}
    return line


def mean_line(lines: list[Line]) -> Line:
    """The means over attacks."""
    average: Line = {"preset": lines[0]["preset"], "defense": lines[0]["defense"]}
    average |= {"attack": f"mean of {len(lines)}", "seeds": "", "gate": ""}
    for name in TITLES:
        values = [value for line in lines if isinstance(value := line[name], float)]
        average |= {name: mean(values), f"{name}_interval": None}
    return average


def mean_by_group(rows: list[Row], kind: TableKind, names: Sequence[str]) -> list[Line]:
    """Means over the runs whose gate passed that have `names` in common.

    What no run measured is None.
    """

    def group(row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in names)

    def order(row: Row) -> list[str]:
        return [value.zfill(9) if value.isdigit() else value for value in group(row)]

    passed = sorted((row for row in rows if row["gate"] == "true"), key=order)
    lines = []
    for key, members in itertools.groupby(passed, key=group):
        runs = list(members)
        line: Line = {**dict(zip(names, key)), "runs": len(runs)}
        for name in kind.counts:
            line[name] = count_true(row[name] for row in runs if row[name])
        for name in kind.titles:
            values = [float(row[name]) for row in runs if row[name] not in ("", "nan")]
            line |= {name: mean(values), f"{name}_interval": None}
        lines.append(line)
    return lines


def count_true(values: Iterable[str]) -> str:
    flags = [value == "true" for value in values]
    return f"{sum(flags)} of {len(flags)}" if flags else ABSENT


def mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % t-interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def one_measure(lines: list[Line], names: tuple[str, ...], measure: str) -> str:
    """One measure as Markdown: a line for each of `names` that has it, a column per attack and,
    where there is one, for their mean.

    Raises: UserError when there is no such measure.
    """
    if lines and measure not in (known := list(known_measures(lines[0]))):
        raise UserError(f"--measure: no measure {measure!r}{suggest(measure, known)}")
    attacks = sorted(
        {str(line["attack"]) for line in lines}, key=lambda name: (name.startswith("mean "), name)
    )
    body: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        if (text := cell(line, measure)) != ABSENT:
            key = tuple(str(line[name]) for name in names)
            body.setdefault(key, {})[str(line["attack"])] = text
    rows = [
        [*key, *(cells.get(attack, ABSENT) for attack in attacks)] for key, cells in body.items()
    ]
    return grid([*names, *attacks], rows)


def known_measures(line: Line) -> Iterator[str]:
    for name in line:
        if f"{name}_interval" in line or name == "label_correct":
            yield name


def grid(head: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def cell(line: Line, name: str) -> str:
    """The text of a value: as it is, or rounded, with its interval."""
    value = line[name]
    half = line.get(f"{name}_interval")
    digits = DIGITS.get(name, 3)
    if value is None:
        return ABSENT
    if isinstance(value, str):
        return value
    return f"{value:.{digits}f}{'' if half is None else f' ± {half:.{digits}f}'}"
