"""Write the results of an audit: weights, masks, the report as page, card and JSON; MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from rnp.detection.base import RecoveredTrigger
from rnp.io.files import sha256, write_json, write_rows, write_text
from rnp.io.models import save_model
from rnp.io.tensors import mask_rows, save_tensors
from rnp.params.read import flatten
from rnp.reporting.page import environment, page, versions
from rnp.reporting.plots import mask_histogram, recovered_triggers, sweep_curve, unlearning_curve
from rnp.tracking.store import Store, flat, tags, to_metrics
from rnp.untrusted.report import AuditReport, Repair

WEIGHTS = "purified.safetensors"
MASKS = "masks.csv"
PARTS = ("mask", "pattern")
MAX_SHOWN = 10
"""Triggers in a picture, at most."""


def write_reports(report: AuditReport, out: Path, command: str = "") -> None:
    """Write report.html and report.json and, after a repair, the model, its masks and its card.

    `command` is the one that the user typed, for the report.
    """
    outputs = {}
    if report.repair:
        write_repair(report, report.repair, out)
        outputs = {name: sha256(out / name) for name in (WEIGHTS, MASKS)}
    described = report.to_dict() | {
        "command": command,
        "outputs": outputs,
        "versions": dict(versions()),
    }
    with tempfile.TemporaryDirectory() as folder:
        write_stage_reports(report, Path(folder))
        page(Path(folder), {}, out / "report.html", audit=described)
    write_json(out / "report.json", described)
    if report.repair:
        template = environment().get_template("modelcard.md.j2")
        write_text(out / "modelcard.md", template.render(result=described))


def write_repair(report: AuditReport, repair: Repair, out: Path) -> None:
    """Write the repaired weights, under the names of the given file, and the masks."""
    loaded = report.loaded
    if loaded.has_normalization:
        save_model(out / WEIGHTS, repair.model, loaded.architecture, report.classes)
    else:
        meta = {"kind": "weights", "arch": loaded.architecture.arch}
        save_tensors(out / WEIGHTS, loaded.named(repair.model), meta)
    write_rows(out / MASKS, mask_rows(repair.recovered.mask, report.unlearned.model))


def write_stage_reports(report: AuditReport, reports: Path) -> None:
    """Write figures and metrics as the stages of the pipeline do, for the page."""
    described = report.to_dict()
    unlearned = report.unlearned
    unlearning_curve(
        reports / "unlearn" / "unlearning.png",
        unlearned.trajectory,
        report.classes,
        unlearned.stop_step,
    )
    trigger = report.suspected_trigger
    title = f"class {report.classes[trigger.label]}"
    recovered_triggers(
        reports / "detect" / "triggers.png", None, [(title, trigger.pattern, trigger.mask)]
    )
    metrics = {
        "unlearn": described["unlearn"],
        "detect": {key: described[key] for key in ("labels", "triggers")},
    }
    if report.repair:
        pruned = report.repair.pruned
        mask_histogram(reports / "recover" / "masks.png", report.repair.recovered.mask)
        sweep_curve(reports / "prune" / "sweep.png", pruned.sweep, pruned.chosen)
        metrics |= {stage: described[stage] for stage in ("recover", "prune")}
    for stage, values in metrics.items():
        write_json(reports / stage / "metrics.json", values)


def write_triggers(
    triggers: Sequence[RecoveredTrigger], classes: tuple[str, ...], out: Path
) -> None:
    """Write the triggers of all classes, in order, and a table and a picture of the smallest."""
    parts = {part: torch.stack([getattr(t, part) for t in triggers]) for part in PARTS}
    save_tensors(out / "triggers.safetensors", parts, {"kind": "recovered triggers"})
    smallest_first = sorted(triggers, key=lambda trigger: trigger.l1)
    rows = [
        {
            "label": trigger.label,
            "class": classes[trigger.label],
            "l1": f"{trigger.l1:.5g}",
            "success": f"{trigger.success:.5g}",
            "baseline": f"{trigger.baseline:.5g}",
            "gain": f"{trigger.gain:.5g}",
        }
        for trigger in smallest_first
    ]
    write_rows(out / "triggers.csv", rows)
    pictures = [
        (f"class {classes[t.label]}, {t.l1:.1f} pixels", t.pattern, t.mask)
        for t in smallest_first[:MAX_SHOWN]
    ]
    recovered_triggers(out / "triggers.png", None, pictures)


def log_to_mlflow(report: AuditReport, out: Path | None) -> None:
    """Log numbers, settings, figures and the files in `out` as a run of its own."""
    store = Store("the report on disk has everything")
    store.guarded(log_run, store, report, out)


def log_run(store: Store, report: AuditReport, out: Path | None) -> None:
    described = report.to_dict()
    settings = described.pop("settings")
    params = dict(flatten(settings))
    run = store.create("purify", tags("purify", "purify", ""), params, report.seconds)
    store.log(run, to_metrics(flat(described)))
    with tempfile.TemporaryDirectory() as folder:
        write_stage_reports(report, Path(folder))
        for stage in sorted(Path(folder).iterdir()):
            store.log_figures(run, stage)
    for file in sorted(out.iterdir()) if out else []:
        store.client.log_artifact(run, str(file))
    store.close(run)
