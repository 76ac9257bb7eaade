"""The columns of the tables of results, and the columns that identify a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEASURES = ("clean_accuracy", "attack_success_rate", "robust_accuracy")
KEY = ("preset", "attack", "defense", "seed")
COLUMNS = (
    *KEY,
    "gate",
    *(f"{name}_before" for name in MEASURES),
    *MEASURES,
    "der",
    "neurons_pruned",
    "neurons",
    "threshold",
    "oracle_clean_accuracy",
    "oracle_attack_success_rate",
    "seconds_train",
    "seconds_unlearn",
    "seconds_recover",
    "seconds_prune",
    "device",
    "version",
    "clean_accuracy_benign",
    "n_clean",
    "n_triggered",
    "torch",
    "seconds_poison",
    "seconds",
    "clean_images",
    "settings",
    "made",
)
DETECTION_KEY = ("preset", "attack", "seed", "task", "detector", "model", "setting")
DETECTION_COLUMNS = (
    "preset",
    "attack",
    "seed",
    "gate",
    "task",
    "detector",
    "model",
    "setting",
    "label_correct",
    "label",
    "margin",
    "auroc",
    "auprc",
    "base_rate",
    "tpr_at_5_fpr",
    "fpr",
    "fpr_target_class",
    "iou",
    "l1",
    "attack_success_rate",
    "clean_accuracy",
    "der",
    "gain",
    "seconds",
    "device",
    "version",
    "torch",
    "settings",
    "made",
)
CONTROL_KEY = ("preset", "attack", "seed", "control", "model", "amount")
CONTROL_COLUMNS = (
    *CONTROL_KEY,
    "gate",
    "clean_accuracy_before",
    "attack_success_rate_before",
    *MEASURES,
    "der",
    "neurons_pruned",
    "seconds",
    "n_clean",
    "n_triggered",
    "device",
    "version",
    "torch",
    "settings",
    "made",
)


@dataclass(frozen=True)
class Schema:
    """The columns of a table, and those of them that identify a row."""

    columns: tuple[str, ...]
    key: tuple[str, ...]


SCHEMAS = {
    "defenses": Schema(COLUMNS, KEY),
    "detection": Schema(DETECTION_COLUMNS, DETECTION_KEY),
    "removal": Schema(DETECTION_COLUMNS, DETECTION_KEY),
    "controls": Schema(CONTROL_COLUMNS, CONTROL_KEY),
}
"""By the kind of rows; detection and removal may share a table."""


def format_row(values: dict[str, object], columns: Sequence[str]) -> dict[str, object]:
    """A row as the table holds it: all columns, rounded numbers, blanks for what is absent."""
    return {name: format_cell(values.get(name, "")) for name in columns}


def format_cell(value: object) -> object:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.5g}" if isinstance(value, float) else value
