"""Append finished runs to a table of results, one row per run and defense."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from pathlib import Path

from rnp.defenses.base import UNLEARNED
from rnp.errors import UserError
from rnp.io.files import read_json, read_rows
from rnp.params.read import flatten
from rnp.registry import load

MEASURES = ("clean_accuracy", "attack_success_rate", "robust_accuracy")
STAGES = ("poison", "train", "unlearn", "recover", "prune")
REFERENCE_MODELS = {"backdoored", "unlearned", "recovered", "benign", "oracle"}
"""The models that `evaluate` measures beside the defenses."""
COLUMNS = (
    "preset",
    "attack",
    "defense",
    "seed",
    "gate",
    *(f"{name}_before" for name in MEASURES),
    *MEASURES,
    "der",
    "neurons_pruned",
    "neurons",
    "threshold",
    "oracle_clean_accuracy",
    "oracle_attack_success_rate",
    *(f"seconds_{stage}" for stage in STAGES if stage != "poison"),
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
KEY = ("preset", "attack", "defense", "seed")
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
    "clean_accuracy",
    "attack_success_rate",
    "robust_accuracy",
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


def settings_digest(params: dict[str, object], attack: str, defense: str) -> str:
    """Two digests: of what every attack shares (data, model, training, defense), and of the
    attack's own options.

    `params` are flat, as MLflow keeps them. Rows are comparable where the first digest is the same.
    """
    own = {
        "rnp": ("unlearn.", "recover.", "prune."),
        "none": (),
        "detect": ("unlearn.", "detect."),
    }.get(defense, (f"defenses.{defense}.",))
    shared = ("data.", f"datasets.{params['data.set']}.", "model.", "train.", *own)

    def digest(prefixes: tuple[str, ...]) -> str:
        chosen = {name: str(value) for name, value in params.items() if name.startswith(prefixes)}
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]

    return f"{digest(shared)}-{digest((f'attacks.{attack}.',))}"


def require_current(stage: str, options: dict[str, object], params: dict) -> None:
    """Raises: UserError when the stage ran with other options than `params` has."""
    whole, _, part = stage.partition("/")
    names = {"train": ("train", "model"), "poison": ("poison", "attacks")}.get(whole, (whole,))
    sections = (
        [params.get("defenses", {}).get(part) or {}]
        if part
        else [params.get(each, {}) for each in names]
    )
    wanted = {"seed": params["seed"]} | {
        name: value for section in sections for name, value in flatten(section)
    }
    used = params["poison"]["attack"] + "."
    for name, value in options.items():
        matters = stage != "poison" or name == "attack" or name.startswith(used)
        if (
            matters
            and name in wanted
            and wanted[name] != (list(value) if isinstance(value, tuple) else value)
        ):
            raise UserError(
                f"{stage} ran with {name} {value}, params.yaml says {wanted[name]}; run `dvc repro`"
                " first"
            )


def provenance(runs: dict[str, dict], flat: dict[str, object], what: str) -> dict[str, object]:
    """Where a row comes from: machine and versions of the last of `runs`, settings (of the defense
    `what`, or of detection), and when.
    """
    run = [*runs.values()][-1]
    return {
        **{
            name: run.get(name, "") for name in ("device", "version", "torch")
        },  # older reports do not say
        "settings": settings_digest(flat, flat["poison.attack"], what),
        "made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
    }


def row(reports: Path, params: dict, defense: str) -> dict[str, object]:
    """What the reports of one run say about RNP (`rnp`), another defense, or the backdoored model
    itself (`none`).

    `seconds` are those of the defense, `clean_images` those that the defender has.
    """
    flat = dict(flatten(params))
    trained, attack = read_json(reports / "train" / "metrics.json"), flat["poison.attack"]
    values = {
        "preset": flat["preset"],
        "attack": attack,
        "defense": defense,
        "seed": flat["seed"],
        "gate": trained["gate"],
        "clean_accuracy_benign": trained["clean_accuracy_benign"],
        "n_clean": trained["n_clean"],
        "n_triggered": trained["n_triggered"],
        **{f"{name}_before": trained[name] for name in MEASURES},
    }
    runs = load_current_runs(reports, params, STAGES[:2])
    values |= {f"seconds_{stage}": run["seconds"] for stage, run in runs.items()}
    if defense == "none":
        values |= {name: trained[name] for name in MEASURES}
    else:
        found = evaluated(reports, trained, attack)
        if defense not in found["models"]:
            raise UserError(
                f"this run has no defense {defense!r}; choose from none,"
                f" {', '.join(found['models'])}"
            )
        values |= {name: found["models"][defense][name] for name in (*MEASURES, "der")}
        runs, given = (
            load_current_runs(reports, params, stages_of_defense(defense)),
            read_json(reports / "prepare" / "metrics.json"),
        )
        values |= {
            "seconds": float(sum(run["seconds"] for run in runs.values())),
            "clean_images": given["defense_train"] + given["defense_val"],
        }
        if defense == "rnp":
            values |= {f"seconds_{stage}": run["seconds"] for stage, run in runs.items()}
            values |= {name: found[name] for name in ("neurons_pruned", "neurons", "threshold")}
            values |= {f"oracle_{name}": found["oracle"][name] for name in MEASURES[:2]}
        else:
            did = read_json(reports / "defend" / defense / "metrics.json")
            values |= {
                "neurons_pruned": did.get("pruned", ""),
                "threshold": did.get("threshold", ""),
            }
    return format_row(values | provenance(runs, flat, defense), COLUMNS)


def stages_of_defense(defense: str) -> tuple[str, ...]:
    return STAGES[2:] if defense == "rnp" else (f"defend/{defense}",)


def load_current_runs(reports: Path, params: dict, stages: tuple[str, ...]) -> dict[str, dict]:
    """What each stage wrote of its run.

    Raises: UserError when one ran with other options than `params` has.
    """
    runs = {stage: read_json(reports / stage / "run.json") for stage in stages}
    for stage, run in runs.items():
        require_current(stage, run["params"], params)
    return runs


def evaluated(reports: Path, trained: dict, attack: str) -> dict:
    """Raises: UserError when `evaluate` measured another model than `trained` tells of."""
    found = read_json(reports / "evaluate" / "metrics.json")
    if found["attack"] != attack or found["model"] != trained["model"]:
        raise UserError(
            "evaluate measured another model than the one that train made; run `dvc repro` first"
        )
    return found


def removal_rows(reports: Path, params: dict) -> list[dict[str, object]]:
    """What each defense of one run came to, the unlearned model being part of it or not: a row per
    defense.
    """
    flat, trained = dict(flatten(params)), read_json(reports / "train" / "metrics.json")
    attack = flat["poison.attack"]
    found = evaluated(reports, trained, attack)
    rows = []
    for name in sorted(found["models"].keys() - REFERENCE_MODELS):
        asks = name == "rnp" or any(
            field.name == "unlearn" for field in dataclasses.fields(load("defense", name))
        )
        runs = load_current_runs(reports, params, stages_of_defense(name))
        rows.append(
            {
                "preset": flat["preset"],
                "attack": attack,
                "seed": flat["seed"],
                "gate": trained["gate"],
                "task": "removal",
                "detector": name.removesuffix(UNLEARNED),
                "model": "unlearned" if asks else "backdoored",
                "setting": "test",
                "seconds": float(sum(run["seconds"] for run in runs.values())),
                **provenance(runs, flat, name),
                **{
                    key: found["models"][name][key]
                    for key in ("clean_accuracy", "attack_success_rate", "der")
                },
            }
        )
    return [format_row(each, DETECTION_COLUMNS) for each in rows]


def detection_rows(reports: Path, params: dict) -> list[dict[str, object]]:
    """What the detectors of one run found: a row per task, detector, model and setting.

    Detectors that were asked of the unlearned benign have `_unlearned` behind their names, since the
    model is the benign model then.
    """
    flat = dict(flatten(params))
    trained, found = (read_json(reports / stage / "metrics.json") for stage in ("train", "detect"))
    runs = load_current_runs(reports, params, (*STAGES[:3], "detect"))
    seconds = read_json(reports / "detect" / "seconds.json")
    common = {
        "preset": flat["preset"],
        "attack": flat["poison.attack"],
        "seed": flat["seed"],
        "setting": "test",
        "gate": trained["gate"],
        **provenance(runs, flat, "detect"),
    }
    rows = []
    for model, values in found["triggers"].items():
        rows.append(
            {
                "task": "triggers",
                "detector": "neural_cleanse",
                "model": model,
                "attack_success_rate": values["success"],
                "seconds": seconds.get(f"triggers_{model}"),
                **values,
            }
        )
    for name, values in found["labels"].items():
        asks = name.endswith(UNLEARNED) or load("labels", name).needs_unlearned
        model = "unlearned" if asks else "backdoored"
        rows.append(
            {
                "task": "labels",
                "detector": name.removesuffix(UNLEARNED),
                "model": model,
                "label_correct": values["correct"],
                "seconds": seconds.get(f"labels_{name}"),
                **values,
            }
        )
    for name, values in found.get("benign_labels", {}).items():
        rows.append(
            {
                "task": "labels",
                "detector": name,
                "model": "benign",
                "label_correct": values["correct"],
                "seconds": seconds.get(f"benign_labels_{name}"),
                **values,
            }
        )
    for key, setting in (("samples", "test"), ("training_samples", "training")):
        for name, values in found.get(key, {}).items():
            rows.append(
                {
                    "task": "samples",
                    "detector": name,
                    "model": "unlearned" if values["asks_unlearned"] else "backdoored",
                    "setting": setting,
                    "seconds": seconds.get(f"{key}_{name}"),
                    **values,
                }
            )
    return [format_row(common | each, DETECTION_COLUMNS) for each in rows]


def control_rows(reports: Path, params: dict) -> list[dict[str, object]]:
    """What the controls of one run showed: a row per control, model and amount."""
    flat, trained = dict(flatten(params)), read_json(reports / "train" / "metrics.json")
    runs = load_current_runs(reports, params, (*STAGES, "controls"))
    common = {
        "preset": flat["preset"],
        "attack": flat["poison.attack"],
        "seed": flat["seed"],
        "gate": trained["gate"],
        "n_clean": trained["n_clean"],
        "n_triggered": trained["n_triggered"],
        **provenance(runs, flat, "rnp"),
    }
    counts = (*CONTROL_KEY, "neurons_pruned")
    measured = [
        {name: value if name in counts else float(value) for name, value in each.items()}
        for each in read_rows(reports / "controls" / "rows.csv")
    ]
    return [format_row(common | each, CONTROL_COLUMNS) for each in measured]


def format_row(values: dict[str, object], columns: tuple[str, ...]) -> dict[str, object]:
    """A row as the table holds it."""

    def cell(value: object) -> object:
        return (
            f"{value:.5g}"
            if isinstance(value, float)
            else str(value).lower()
            if isinstance(value, bool)
            else value
        )

    return {name: cell(values.get(name, "")) for name in columns}
