"""Collect finished runs into one table: means over seeds with 95 % intervals, as Markdown or
CSV.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from rnp.errors import UserError
from rnp.io.files import read_rows
from rnp.registry import suggest
from rnp.reporting.rows import (
    COLUMNS,
    CONTROL_COLUMNS,
    DETECTION_COLUMNS,
    MEASURES,
    REFERENCE_MODELS,
    settings_digest,
    stages_of_defense,
)
from rnp.tracking.store import finished_rows

GROUP = ("preset", "defense", "attack")
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
class TableKind:
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
    ),
    TableKind(CONTROL_COLUMNS, ("preset", "control", "model", "amount"), TITLES),
)


def read(path: Path) -> list[Row]:
    rows = read_rows(path)
    if rows and not set(COLUMNS) <= set(rows[0]):
        raise UserError(
            f"{path} is no table of `rnp rows`: it lacks"
            f" {', '.join(sorted(set(COLUMNS) - set(rows[0])))}"
        )
    return rows


def from_mlflow() -> list[Row]:
    """One row per finished configuration and defense in the MLflow store."""
    rows = []
    for params, metrics, made in finished_rows():
        attack = params["poison.attack"]
        names = {name.split("/")[2] for name in metrics if name.startswith("evaluate/models/")}
        for defense in sorted(names - REFERENCE_MODELS):
            values = {
                name: metrics[f"evaluate/models/{defense}/{name}"] for name in (*MEASURES, "der")
            }
            values |= {
                f"{name}_before": metrics[f"evaluate/{name}_before"] for name in MEASURES[:2]
            }
            values |= {
                "seconds": sum(metrics[f"time/{stage}"] for stage in stages_of_defense(defense)),
                "neurons_pruned": metrics.get(
                    "evaluate/neurons_pruned" if defense == "rnp" else f"defend/{defense}/pruned"
                ),
            }
            rows.append(
                {name: "" if value is None else f"{value:.5g}" for name, value in values.items()}
                | {
                    "preset": params["preset"],
                    "attack": attack,
                    "defense": defense,
                    "seed": params["seed"],
                    "made": made,
                    "gate": str(bool(metrics["train/gate"])).lower(),
                    "settings": settings_digest(params, attack, defense),
                }
            )
    return rows


def latest_comparable(rows: list[Row]) -> list[Row]:
    """Without repetitions, and without rows that other settings made than those of the newest row
    beside them.
    """
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


def mean_over_seeds(rows: list[Row]) -> list[dict[str, object]]:
    """A line per preset, defense and attack, and for each preset and defense the mean over the
    attacks that are real.
    """
    rows = sorted(rows, key=lambda row: [row[name] for name in GROUP])
    lines = []
    for (preset, defense), members in itertools.groupby(
        rows, key=lambda row: (row["preset"], row["defense"])
    ):
        real = []
        for attack, some in itertools.groupby(members, key=lambda row: row["attack"]):
            some = list(some)
            passed = sum(row["gate"] == "true" for row in some)
            line = {
                "preset": preset,
                "defense": defense,
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
                    "defense": defense,
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


def kind_of(rows: list[Row]) -> TableKind | None:
    """None: a table of defenses, or none of ours."""
    return next((kind for kind in KINDS if rows and set(kind.columns) <= set(rows[0])), None)


def mean_by_group(
    rows: list[Row], kind: TableKind, names: tuple[str, ...]
) -> list[dict[str, object]]:
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
