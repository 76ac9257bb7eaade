"""The rows that one finished run adds to the tables of results."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from rnp.defenses.base import UNLEARNED
from rnp.errors import UserError
from rnp.io.files import read_json, read_rows, upsert_rows
from rnp.params.read import flatten, params_in_use
from rnp.registry import load
from rnp.reporting.columns import CONTROL_KEY, MEASURES, SCHEMAS, format_row
from rnp.reporting.stages import RNP_STAGES

if TYPE_CHECKING:
    from rnp.detection.base import LabelDetector

REFERENCE_MODELS = {"backdoored", "unlearned", "recovered", "benign", "oracle"}
"""The models that `evaluate` measures beside the defenses."""
NO_DEFENSE = "none"
"""In place of a defense: the backdoored model itself."""
Row = dict[str, object]


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """One run of the pipeline: its report folders and its parameters."""

    reports: Path
    params: dict

    @functools.cached_property
    def settings(self) -> dict[str, object]:
        """The parameters in use, by their full names."""
        return dict(flatten(params_in_use(self.params)))

    @property
    def attack(self) -> str:
        return self.params["poison"]["attack"]

    @functools.cached_property
    def trained(self) -> dict:
        """The metrics of the backdoored model."""
        return self.metrics("train")

    def metrics(self, stage: str) -> dict:
        return read_json(self.reports / stage / "metrics.json")

    def evaluation(self) -> dict:
        """Raises: UserError when `evaluate` measured another model than `train` wrote."""
        evaluation = self.metrics("evaluate")
        if (evaluation["attack"], evaluation["model"]) != (self.attack, self.trained["model"]):
            raise UserError(
                "evaluate measured another model than the one that train made; run `dvc repro`"
                " first"
            )
        return evaluation

    def runs(self, *stages: str) -> dict[str, dict]:
        """The run.json of each stage; see `load_current_runs`."""
        return load_current_runs(self.reports, self.params, stages)

    def identity(self) -> Row:
        return {
            "preset": self.settings["preset"],
            "attack": self.attack,
            "seed": self.settings["seed"],
            "gate": self.trained["gate"],
        }

    def origin(self, run: dict, subject: str) -> Row:
        """Machine and versions of `run`, the settings of `subject` (see `settings_digest`), now."""
        return {
            **{name: run.get(name, "") for name in ("device", "version", "torch")},
            "settings": settings_digest(self.settings, self.attack, subject),
            "made": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M}",
        }


def collect_rows(
    table: Path, kind: str, reports: Path, params: dict, *, defense: str = "rnp"
) -> None:
    """Add the rows of a finished run to a table, in place of its older rows there.

    `kind` is a key of `SCHEMAS`; `defense` is that of the kind `defenses`.

    Raises: UserError when a stage ran with other parameters than `params`.
    """
    run = FinishedRun(reports, params)
    if kind == "defenses":
        rows = [defense_row(run, defense)]
    else:
        makers = {"detection": detection_rows, "removal": removal_rows, "controls": control_rows}
        rows = list(makers[kind](run))
    schema = SCHEMAS[kind]
    formatted = [format_row(row, schema.columns) for row in rows]
    upsert_rows(table, formatted, schema.columns, schema.key)


def settings_digest(params: dict[str, object], attack: str, subject: str) -> str:
    """Two digests: of what every attack shares, and of the attack's own options.

    All attacks share data, model, training, precision and the options of `subject`, which is `rnp`,
    another defense, `none`, or `detect`. `params` are those in use by their full names, as numbers
    or as text. Rows are comparable where the first digest is the same.
    """
    sections = {
        "rnp": ("unlearn.", "recover.", "prune."),
        NO_DEFENSE: (),
        "detect": ("unlearn.", "detect."),
    }
    own = sections.get(subject, (f"defenses.{subject}.",))
    shared = ("precision", "data.", "datasets.", "model.", "train.", *own)
    return f"{digest_of(params, shared)}-{digest_of(params, (f'attacks.{attack}.',))}"


def digest_of(params: dict[str, object], prefixes: tuple[str, ...]) -> str:
    chosen = {name: str(value) for name, value in params.items() if name.startswith(prefixes)}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]


def require_current(stage: str, recorded: dict[str, object], params: dict) -> None:
    """Raises: UserError when a stage ran with another value of a parameter than params.yaml has.

    A parameter that params.yaml lacks has its default, and is not compared.
    """
    current = dict(flatten(params))
    for name, value in recorded.items():
        if name in current and as_list(value) != as_list(current[name]):
            raise UserError(
                f"{stage} ran with {name} {value}, params.yaml says {current[name]};"
                " run `dvc repro` first"
            )


def as_list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def load_current_runs(reports: Path, params: dict, stages: tuple[str, ...]) -> dict[str, dict]:
    """The run.json of each stage.

    Raises: UserError when one ran with other parameters than `params`.
    """
    runs = {stage: read_json(reports / stage / "run.json") for stage in stages}
    for stage, run in runs.items():
        require_current(stage, run["params"], params)
    return runs


def stages_of_defense(defense: str) -> tuple[str, ...]:
    return RNP_STAGES if defense == "rnp" else (f"defend/{defense}",)


def total_seconds(runs: dict[str, dict]) -> float:
    return float(sum(run["seconds"] for run in runs.values()))


def last(runs: dict[str, dict]) -> dict:
    return list(runs.values())[-1]


def defense_row(run: FinishedRun, defense: str) -> Row:
    """The row of RNP (`rnp`), of another defense, or of the backdoored model itself (`none`).

    `seconds` are those of the defense, `clean_images` those that the defender has.
    """
    trained = run.trained
    runs = run.runs("poison", "train")
    row = run.identity() | {
        "defense": defense,
        "clean_accuracy_benign": trained["clean_accuracy_benign"],
        "n_clean": trained["n_clean"],
        "n_triggered": trained["n_triggered"],
        **{f"{name}_before": trained[name] for name in MEASURES},
        **{f"seconds_{stage}": record["seconds"] for stage, record in runs.items()},
    }
    if defense == NO_DEFENSE:
        row |= {name: trained[name] for name in MEASURES}
    else:
        require_measured(run, defense)
        runs = run.runs(*stages_of_defense(defense))
        row |= repair_values(run, defense, runs)
    return row | run.origin(last(runs), defense)


def require_measured(run: FinishedRun, defense: str) -> None:
    """Raises: UserError when the run measured no such defense."""
    models = run.evaluation()["models"]
    if defense not in models:
        known = ", ".join(models)
        raise UserError(f"this run has no defense {defense!r}; choose from none, {known}")


def repair_values(run: FinishedRun, defense: str, runs: dict[str, dict]) -> Row:
    """The columns of a repaired model."""
    evaluation = run.evaluation()
    models = evaluation["models"]
    split = run.metrics("prepare")
    values = {name: models[defense][name] for name in (*MEASURES, "der")} | {
        "seconds": total_seconds(runs),
        "clean_images": split["defense_train"] + split["defense_val"],
    }
    if defense == "rnp":
        return values | {
            **{f"seconds_{stage}": record["seconds"] for stage, record in runs.items()},
            **{name: evaluation[name] for name in ("neurons_pruned", "neurons", "threshold")},
            **{f"oracle_{name}": evaluation["oracle"][name] for name in MEASURES[:2]},
        }
    metrics = run.metrics(f"defend/{defense}")
    return values | {
        "neurons_pruned": metrics.get("pruned", ""),
        "threshold": metrics.get("threshold", ""),
    }


def removal_rows(run: FinishedRun) -> Iterator[Row]:
    """A row per defense, with the model that it works on: the unlearned or the backdoored one."""
    models = run.evaluation()["models"]
    for name in sorted(models.keys() - REFERENCE_MODELS):
        runs = run.runs(*stages_of_defense(name))
        measures = ("clean_accuracy", "attack_success_rate", "der")
        yield {
            **run.identity(),
            "task": "removal",
            "detector": name.removesuffix(UNLEARNED),
            "model": "unlearned" if uses_unlearned(name) else "backdoored",
            "setting": "test",
            "seconds": total_seconds(runs),
            **run.origin(last(runs), name),
            **{measure: models[name][measure] for measure in measures},
            **tuned_values(run, name),
        }


def tuned_values(run: FinishedRun, defense: str) -> Row:
    """Whether a defense that looks for labels to tune against found the attack's."""
    tuned = {} if defense == "rnp" else run.metrics(f"defend/{defense}")
    if "tuned_labels" not in tuned:
        return {}
    labels = tuned["tuned_labels"]
    target = run.evaluation().get("target_label")
    if target is None:  # each class has its own, or an older version measured
        return {"label": labels}
    return {"label": labels, "label_correct": str(target) in labels.split()}


def uses_unlearned(defense: str) -> bool:
    """Whether a defense unlearns the model, as its hyperparameters show."""
    return hasattr(load("defense", defense), "unlearn")


def detection_rows(run: FinishedRun) -> Iterator[Row]:
    """A row per task, detector, model and setting.

    The names of detectors that judge the benign model after unlearning end with `_unlearned`,
    since their model is `benign`.
    """
    runs = run.runs("poison", "train", "unlearn", "detect")
    common = run.identity() | run.origin(last(runs), "detect")
    metrics = run.metrics("detect")
    seconds = read_json(run.reports / "detect" / "seconds.json")
    for row in (*trigger_rows(metrics), *label_rows(metrics), *sample_rows(metrics)):
        yield common | row | {"seconds": seconds.get(row["timed_as"])}


def trigger_rows(metrics: dict) -> Iterator[Row]:
    """The recovered triggers; `timed_as` is the name of a row's seconds."""
    for model, values in metrics["triggers"].items():
        yield {
            "task": "triggers",
            "detector": "neural_cleanse",
            "model": model,
            "setting": "test",
            "attack_success_rate": values["success"],
            "timed_as": f"triggers_{model}",
            **values,
        }


def label_rows(metrics: dict) -> Iterator[Row]:
    """The detectors of the label, on the attacked models and on the benign one."""
    for name, values in metrics["labels"].items():
        model = "unlearned" if judges_unlearned(name) else "backdoored"
        yield label_row(name.removesuffix(UNLEARNED), model, f"labels_{name}", values)
    for name, values in metrics.get("benign_labels", {}).items():
        yield label_row(name, "benign", f"benign_labels_{name}", values)


def judges_unlearned(name: str) -> bool:
    """Whether these results of a label detector are about the unlearned model."""
    if name.endswith(UNLEARNED):
        return True
    return cast("type[LabelDetector]", load("labels", name)).needs_unlearned


def label_row(detector: str, model: str, timed_as: str, values: dict) -> Row:
    return {
        "task": "labels",
        "detector": detector,
        "model": model,
        "setting": "test",
        "label_correct": values["correct"],
        "timed_as": timed_as,
        **values,
    }


def sample_rows(metrics: dict) -> Iterator[Row]:
    """The detectors of samples, among test images and among training images."""
    for key, setting in (("samples", "test"), ("training_samples", "training")):
        for name, values in metrics.get(key, {}).items():
            yield {
                "task": "samples",
                "detector": name,
                "model": "unlearned" if values["needs_unlearned"] else "backdoored",
                "setting": setting,
                "timed_as": f"{key}_{name}",
                **values,
            }


def control_rows(run: FinishedRun) -> Iterator[Row]:
    """A row per control experiment, model and amount."""
    runs = run.runs("poison", "train", *RNP_STAGES, "controls")
    common = run.identity() | {
        "n_clean": run.trained["n_clean"],
        "n_triggered": run.trained["n_triggered"],
        **run.origin(last(runs), "rnp"),
    }
    counts = (*CONTROL_KEY, "neurons_pruned")
    for row in read_rows(run.reports / "controls" / "rows.csv"):
        yield common | {
            name: value if name in counts else float(value) for name, value in row.items()
        }
