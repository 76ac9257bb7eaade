"""The last stage: one MLflow row per configuration, made from the stages' files, and a summary."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from rnp.cli.main import guard
from rnp.errors import UserError
from rnp.io.files import read_json, write_json
from rnp.params.read import flatten, params_in_use, read_params
from rnp.reporting.stages import COSTS, PER_IMAGE, RNP_STAGES, STAGES, passes
from rnp.tracking.models import log_dataset, log_model
from rnp.tracking.store import (
    Store,
    database,
    digest,
    experiment_name,
    flat,
    hide_credentials,
    store_uri,
    tags,
    to_metrics,
)
from stages.summary import PAGE, summary

PARAMS = Path("params.yaml")
LOCK = Path("dvc.lock")
REPORTS = Path("reports")
MARKER = Path(".rnp/published.json")
"""The row of the last time, by which a rerun without changes needs no MLflow."""
IMAGES = Path("data/test/images.npy")
"""Images of the size that the models take."""
MODELS = {
    "backdoored": ("train", Path("models/backdoored.safetensors")),
    "repaired": ("prune", Path("models/pruned/model.safetensors")),
}
"""The models that MLflow keeps, with the stages that write them."""
FINISHED = "attributes.status = 'FINISHED'"
"""Runs that were cut short do not count and are made anew."""
PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class FinishedStage:
    """A stage, by what it left in its report folder."""

    report: Path
    run: dict

    @property
    def name(self) -> str:
        return self.run["stage"]

    @property
    def seconds(self) -> float:
        return self.run["seconds"]

    @property
    def costs(self) -> dict[str, float]:
        """Seconds and, where they were counted, multiply-adds."""
        return {name: self.run[name] for name in COSTS if name in self.run}

    def metrics(self) -> dict:
        return read_json(self.report / "metrics.json", default={})

    def history(self) -> list:
        """The metrics of its history, as MLflow takes them."""
        file = self.report / "history.csv"
        if not file.is_file():
            return []
        with file.open(newline="") as lines:
            rows = [
                {name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)
            ]
        return [point for row in rows for point in to_metrics(row, int(row["step"]))]

    def content_hash(self) -> str:
        """A tag of a rebuilt run, by which the same files are rebuilt only once."""
        files = [self.report / name for name in ("run.json", "metrics.json", "history.csv")]
        content = b"".join(file.read_bytes() for file in files if file.is_file())
        return hashlib.sha256(content).hexdigest()


def publish() -> None:
    """Make the row of this configuration unless there is one, and print a summary."""
    params = read_params(PARAMS)
    finished = finished_stages(params.get("defenses") or {})
    row = find_or_make_row(params, finished)
    summary(
        {stage.name: stage.seconds for stage in finished},
        rnp_passes({stage.name: stage for stage in finished}),
        read_json(REPORTS / "evaluate/metrics.json", default={}),
    )
    print("MLflow     ", describe_row(row, store_uri()))


def rnp_passes(finished: dict[str, FinishedStage]) -> str:
    """The passes of an image that RNP took; empty if one of its stages is missing."""
    if not finished.keys() >= set(RNP_STAGES):
        return ""
    per_image = finished["unlearn"].metrics().get(PER_IMAGE, 0)
    return passes([finished[stage].run for stage in RNP_STAGES], per_image)


def describe_row(row: list[str] | None, uri: str | None) -> str:
    if uri is None:
        return "off"
    if row is None:
        return "no row, see above"
    file = database(uri)
    place = f"{file.name}; `make ui` compares it with others" if file else hide_credentials(uri)
    return f"row {row[1]} in {place}"


def finished_stages(defenses: dict) -> list[FinishedStage]:
    """The stages in their order; among the defenses only those of params.yaml.

    Raises: UserError when there is none, or one that has not ended.
    """
    names = [
        name
        for stage in STAGES
        for name in ([f"defend/{key}" for key in defenses] if stage == "defend" else [stage])
    ]
    reports = [REPORTS / name for name in names if (REPORTS / name).is_dir()]
    if not reports:
        raise UserError(f"no stage has left anything in {REPORTS}; run `dvc repro`")
    return [FinishedStage(report, read_run(report)) for report in reports]


def read_run(report: Path) -> dict:
    run = read_json(report / "run.json", default={})
    if not run:
        raise UserError(f"{report} holds no run.json: its stage has not ended; run `dvc repro`")
    return run


def find_or_make_row(params: dict, finished: list[FinishedStage]) -> list[str] | None:
    """Id and name of the row of this configuration; None where MLflow is off or fails."""
    uri = store_uri()
    if uri is None:
        return None
    used = params_in_use(params)
    key = digest([used, [stage.run for stage in finished]])
    row = published_row(key, uri)
    if row is None:
        store = Store()
        row = store.guarded(find_row, store, key) or store.guarded(
            make_row, store, finished, used, key
        )
        if row:
            write_json(MARKER, {"key": key, "store": store_key(uri), "row": row})
    return row


def store_key(uri: str) -> str:
    return digest([uri, experiment_name()])


def published_row(key: str, uri: str) -> list[str] | None:
    """The row if it was made before and still exists.

    This imports no MLflow, which takes longer than all the rest.
    """
    marker = read_json(MARKER, default={})
    if (marker.get("key"), marker.get("store")) != (key, store_key(uri)):
        return None
    file = database(uri)
    return marker["row"] if file is None or run_exists(file, marker["row"][0]) else None


def run_exists(file: Path, run_id: str) -> bool:
    """Whether the sqlite store has this run: the file may be deleted, or a new one."""
    query = "select 1 from runs where run_uuid = ?"
    try:
        read_only = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
        with contextlib.closing(read_only) as connection:
            return connection.execute(query, (run_id,)).fetchone() is not None
    except sqlite3.Error:
        return False


def find_row(store: Store, key: str) -> list[str] | None:
    """Id and name of the row with this key, if there is one."""
    condition = f"tags.`rnp.kind` = 'pipeline' and tags.`rnp.key` = '{key}' and {FINISHED}"
    rows = store.search(condition)
    return [rows[0].info.run_id, str(rows[0].info.run_name)] if rows else None


def make_row(store: Store, finished: list[FinishedStage], params: dict, key: str) -> list[str]:
    """Id and name of a new row, which holds `params`, and everything that the stages left."""
    attack = params["poison"]["attack"]
    runs = stage_runs(store, finished, attack)
    name = f"{os.environ.get('DVC_EXP_NAME') or attack}-{key[:6]}"
    links = {f"rnp.run.{stage}": run_id for stage, run_id in runs.items()}
    row = store.create(name, tags("pipeline", "publish", key) | links, dict(flatten(params)))
    log_stages(store, row, finished)
    for file, folder in ((PARAMS, "config"), (LOCK, "config"), (PAGE, "report")):
        if file.is_file():
            store.client.log_artifact(row, str(file), folder)
    link_data(store, row, params)
    link_models(store, row, runs)
    store.close(row)
    for run_id in runs.values():
        if PARENT not in store.client.get_run(run_id).data.tags:
            store.client.set_tag(run_id, PARENT, row)
    return [row, name]


def log_stages(store: Store, row: str, finished: list[FinishedStage]) -> None:
    """Log times, metrics and figures of the stages."""
    numbers = {f"time/{stage.name}": stage.seconds for stage in finished}
    for stage in finished:
        work = {name: value for name, value in stage.costs.items() if name != "seconds"}
        numbers |= {f"{stage.name}/{name}": value for name, value in work.items()}
        numbers |= flat(stage.metrics(), f"{stage.name}/")
        store.log_figures(row, stage.report, f"plots/{stage.name}")
    store.log(row, to_metrics(numbers))


def stage_runs(store: Store, finished: list[FinishedStage], attack: str) -> dict[str, str]:
    """The id of each stage's run.

    A run that the store does not have, or that did not end there, is rebuilt from the files.
    """
    ids = ", ".join(f"'{stage.run['run_id']}'" for stage in finished)
    condition = f"attributes.run_id IN ({ids}) and {FINISHED}"
    known = {run.info.run_id for run in store.search(condition)}
    runs = {}
    for stage in finished:
        run_id = stage.run["run_id"]
        runs[stage.name] = run_id if run_id in known else rebuild(store, stage, attack)
    return runs


def rebuild(store: Store, stage: FinishedStage, attack: str) -> str:
    """The id of a run made from the files of `stage`, now or before."""
    mark = stage.content_hash()
    for run in store.search(f"tags.`rnp.backfill` = '{mark}' and {FINISHED}"):
        return run.info.run_id
    params = stage.run["params"]
    labels = tags("stage", stage.name, digest([stage.name, params])) | {
        "rnp.backfill": mark,
        "dvc.stage": stage.name.replace("/", "@"),
    }
    run_id = store.create(f"{stage.name}-{attack}", labels, params, stage.seconds)
    store.log(run_id, stage.history())
    store.log_report(run_id, stage.report, stage.costs)
    store.close(run_id)
    return run_id


def link_data(store: Store, row: str, params: dict) -> None:
    """Log the poisoned training set, by the digest under which DVC keeps it."""
    stages = read_params(LOCK)["stages"] if LOCK.is_file() else {}
    name = f"{params['data']['name']}-{params['poison']['attack']}"
    for out in stages.get("poison", {}).get("outs", []):
        if out["path"].startswith("data/"):
            log_dataset(store, row, name, out["md5"], out["path"])


def link_models(store: Store, row: str, runs: dict[str, str]) -> None:
    """Link the models before and after: each file is kept once, for all its rows."""
    import numpy as np

    for name, (stage, file) in MODELS.items():
        if file.is_file():
            shape = np.load(IMAGES, mmap_mode="r").shape[1:]
            backdoored = name == "backdoored"
            log_model(store, row, file, name, shape, backdoored=backdoored, maker=runs[stage])


if __name__ == "__main__":
    with guard():
        publish()
