"""Append finished runs to a table of results, one row per run and defence."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import click

from rnp.cli.check import read_params
from rnp.errors import UserError
from rnp.io import read_json, read_rows, write_rows

COLUMNS = (
    "preset", "attack", "defence", "seed", "gate", "clean_accuracy_before", "attack_success_rate_before",
    "robust_accuracy_before", "clean_accuracy", "attack_success_rate", "robust_accuracy", "der", "neurons_pruned", "neurons",
    "threshold", "oracle_clean_accuracy", "oracle_attack_success_rate", "seconds_train", "seconds_unlearn", "seconds_recover",
    "seconds_prune", "device", "version", "clean_accuracy_twin", "n_clean", "n_triggered", "torch",
)
KEY = ("preset", "attack", "defence", "seed")


def machine() -> str:
    """The processor and how much of it there is, or the GPU, as RNP_DEVICE chose."""
    import torch

    from rnp.training import default_device

    if default_device().type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def row(reports: Path, params: dict, defence: str) -> dict[str, object]:
    """What the reports of one complete run say about RNP (`rnp`) or another defence."""
    import torch

    found = read_json(reports / "evaluate" / "metrics.json")
    seconds = {stage: read_json(reports / stage / "run.json")["seconds"] for stage in ("train", "unlearn", "recover", "prune")}
    own = found["models"][defence]
    rnp = defence == "rnp"
    values = {
        "preset": params["preset"], "attack": found["attack"], "defence": defence, "seed": params["seed"],
        "gate": str(found["gate"]).lower(),
        **{f"{name}_before": found[f"{name}_before"] for name in ("clean_accuracy", "attack_success_rate", "robust_accuracy")},
        **{name: own[name] for name in ("clean_accuracy", "attack_success_rate", "robust_accuracy", "der")},
        "neurons_pruned": found["neurons_pruned"] if rnp else "", "neurons": found["neurons"],
        "threshold": found["threshold"] if rnp else "",
        **{f"oracle_{name}": found["oracle"][name] if rnp else "" for name in ("clean_accuracy", "attack_success_rate")},
        **{f"seconds_{stage}": seconds[stage] if rnp or stage == "train" else "" for stage in seconds},
        "device": machine(), "version": importlib.metadata.version("rnp"),
        "clean_accuracy_twin": found["clean_accuracy_twin"], "n_clean": found["n_clean"], "n_triggered": found["n_triggered"],
        "torch": torch.__version__,
    }
    return {name: f"{values[name]:.5g}" if isinstance(values[name], float) else values[name] for name in COLUMNS}


@click.command()
@click.argument("table", type=click.Path(path_type=Path))
@click.option("--reports", type=click.Path(path_type=Path, exists=True), default="reports", show_default=True)
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", show_default=True)
@click.option("--defence", default="rnp", show_default=True, help="rnp, or another defence of the run")
def rows(table: Path, reports: Path, params: Path, defence: str) -> None:
    """Put the finished run of this folder into TABLE (a CSV); an older row of the same preset, attack, defence and seed goes."""
    new = row(reports, read_params(params), defence)
    old = read_rows(table) if table.exists() else []
    if old and list(old[0]) != list(COLUMNS):
        raise UserError(f"{table} has other columns than rows of this version; write to a new file")
    kept = [each for each in old if any(each[name] != str(new[name]) for name in KEY)]
    write_rows(table, sorted([*kept, new], key=lambda each: [str(each[name]) for name in KEY]))
