"""The last stage: one MLflow row per configuration, made of the files that the stages left, and a
summary.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from rnp.cli.main import guard
from rnp.errors import UserError
from rnp.params.read import flatten, read_params
from rnp.tracking.models import log_dataset, log_model
from rnp.tracking.store import (
    Store,
    database,
    digest,
    experiment_name,
    flat,
    hide_credentials,
    load,
    store_uri,
    tags,
    to_metrics,
)
from stages.summary import PAGE, summary

ORDER = (
    "prepare",
    "benign",
    "poison",
    "train",
    "unlearn",
    "recover",
    "prune",
    "defend",
    "detect",
    "controls",
    "evaluate",
    "report",
)
PARAMS, LOCK, REPORTS, MARKER = (
    Path("params.yaml"),
    Path("dvc.lock"),
    Path("reports"),
    Path(".rnp/published.json"),
)
IMAGES = Path("data/test/images.npy")  # they have the size that the models take
MODELS = {
    "backdoored": ("train", Path("models/backdoored.safetensors")),
    "repaired": ("prune", Path("models/pruned/model.safetensors")),
}
ENDED = "attributes.status = 'FINISHED'"  # what is cut short does not count and is made anew
PARENT = "mlflow.parentRunId"


@dataclass(frozen=True)
class Finished:
    """A stage, by what it left in its report folder."""

    report: Path
    run: dict

    @property
    def stage(self) -> str:
        return self.run["stage"]

    def metrics(self) -> dict:
        return load(self.report / "metrics.json")

    def history(self) -> list:
        file = self.report / "history.csv"
        if not file.is_file():
            return []
        with file.open(newline="") as lines:
            rows = [
                {name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)
            ]
        return [point for row in rows for point in to_metrics(row, int(row["step"]))]

    def content_hash(self) -> str:
        """What a rebuilt run carries, so that the same files are rebuilt once."""
        files = [self.report / name for name in ("run.json", "metrics.json", "history.csv")]
        return hashlib.sha256(
            b"".join(file.read_bytes() for file in files if file.is_file())
        ).hexdigest()


def publish() -> None:
    """Make the row of this configuration unless there is one, and print what came out."""
    params = read_params(PARAMS)
    done = finished(params.get("defenses") or {})
    key, uri = digest([params, [each.run for each in done]]), store_uri()
    row = published(key, uri)
    if uri and not row:
        store = Store()
        row = store.guarded(find_or_make, store, done, params, key)
        if row:
            write_marker({"key": key, "store": digest([uri, experiment_name()]), "row": row})
    summary(
        {each.stage: each.run["seconds"] for each in done}, load(REPORTS / "evaluate/metrics.json")
    )
    print(
        "MLflow     ",
        f"row {row[1]} in {describe_store(uri)}" if row else "no row, see above" if uri else "off",
    )


def describe_store(uri: str) -> str:
    return (
        f"{database(uri).name}; `make ui` compares it with others"
        if database(uri)
        else hide_credentials(uri)
    )


def finished(defenses: dict) -> list[Finished]:
    """The stages in their order; of the reports on defenses those that count now, whatever else
    lies about.

    Raises: UserError when there is none, or one that has not ended.
    """
    names = [
        each
        for stage in ORDER
        for each in ([f"defend/{name}" for name in defenses] if stage == "defend" else [stage])
    ]
    folders = [REPORTS / name for name in names if (REPORTS / name).is_dir()]
    found = [Finished(folder, load(folder / "run.json")) for folder in folders]
    for each in found:
        if not each.run:
            raise UserError(
                f"{each.report} holds no run.json: its stage has not ended; run `dvc repro`"
            )
    if not found:
        raise UserError(f"no stage has left anything in {REPORTS}; run `dvc repro`")
    return found


def write_marker(marker: dict) -> None:
    """As `rnp.io` writes JSON, without PyTorch."""
    MARKER.parent.mkdir(exist_ok=True)
    draft = MARKER.with_suffix(".part")
    draft.write_text(json.dumps(marker))
    draft.replace(MARKER)


def published(key: str, uri: str | None) -> list[str] | None:
    """The row if it was made before and is still there. Asks no MLflow: importing it takes longer
    than all the rest.
    """
    marker = load(MARKER)
    if uri is None or (marker.get("key"), marker.get("store")) != (
        key,
        digest([uri, experiment_name()]),
    ):
        return None
    file = database(uri)
    return marker["row"] if file is None or run_exists(file, marker["row"][0]) else None


def run_exists(file: Path, run_id: str) -> bool:
    """Whether the sqlite store has this run: the file may have been deleted, and perhaps made
    anew.
    """
    try:
        with contextlib.closing(
            sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)
        ) as connection:
            return (
                connection.execute("select 1 from runs where run_uuid = ?", (run_id,)).fetchone()
                is not None
            )
    except sqlite3.Error:
        return False


def find_or_make(store: Store, done: list[Finished], params: dict, key: str) -> list[str]:
    """Id and name of the row with this key."""
    for old in store.search(
        f"tags.`rnp.kind` = 'pipeline' and tags.`rnp.key` = '{key}' and {ENDED}"
    ):
        return [old.info.run_id, old.info.run_name]
    attack = params["poison"]["attack"]
    runs = stage_runs(store, done, attack)
    name = f"{os.environ.get('DVC_EXP_NAME') or attack}-{key[:6]}"
    links = {f"rnp.run.{stage}": run_id for stage, run_id in runs.items()}
    row = store.create(name, tags("pipeline", "publish", key) | links, dict(flatten(params)))
    numbers = {f"time/{each.stage}": each.run["seconds"] for each in done}
    for each in done:
        numbers |= flat(each.metrics(), f"{each.stage}/")
        store.log_figures(row, each.report, f"plots/{each.stage}")
    store.log(row, to_metrics(numbers))
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


def stage_runs(store: Store, done: list[Finished], attack: str) -> dict[str, str]:
    """The run of each stage by its id; those that the store does not know, or not to the end, are
    made of files.
    """
    ids = ", ".join(f"'{each.run['run_id']}'" for each in done)
    known = {run.info.run_id for run in store.search(f"attributes.run_id IN ({ids}) and {ENDED}")}
    return {
        each.stage: (
            each.run["run_id"] if each.run["run_id"] in known else rebuild(store, each, attack)
        )
        for each in done
    }


def rebuild(store: Store, each: Finished, attack: str) -> str:
    mark, stage, params, seconds = (
        each.content_hash(),
        each.stage,
        each.run["params"],
        each.run["seconds"],
    )
    for old in store.search(f"tags.`rnp.backfill` = '{mark}' and {ENDED}"):
        return old.info.run_id
    labels = tags("stage", stage, digest([stage, params])) | {
        "rnp.backfill": mark,
        "dvc.stage": stage.replace("/", "@"),
    }
    run_id = store.create(f"{stage}-{attack}", labels, params, seconds)
    store.log(run_id, each.history())
    store.log_report(run_id, each.report, seconds)
    store.close(run_id)
    return run_id


def link_data(store: Store, row: str, params: dict) -> None:
    """The poisoned training set, by the digest under which DVC keeps it."""
    stages = read_params(LOCK)["stages"] if LOCK.is_file() else {}
    for out in stages.get("poison", {}).get("outs", []):
        if out["path"].startswith("data/"):
            log_dataset(
                store,
                row,
                f"{params['data']['set']}-{params['poison']['attack']}",
                out["md5"],
                out["path"],
            )


def link_models(store: Store, row: str, runs: dict[str, str]) -> None:
    """The models before and after: each is kept once, however many rows it belongs to."""
    import numpy as np

    for name, (stage, file) in MODELS.items():
        if file.is_file():
            shape = np.load(IMAGES, mmap_mode="r").shape[1:]
            log_model(
                store, row, file, name, shape, backdoored=name == "backdoored", maker=runs[stage]
            )


if __name__ == "__main__":
    with guard():
        publish()
