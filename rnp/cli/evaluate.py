"""Measure CA, ASR, RA and DER of every model.

It is the only step after training that reads the test set and the triggers.
"""

from __future__ import annotations

from pathlib import Path

from rnp.cli.options import Files, command
from rnp.evaluation.metrics import EvaluationSets
from rnp.evaluation.oracle import Evaluate, PruningOrder, evaluate_models
from rnp.io.datasets import load_images
from rnp.io.files import read_json, sha256, write_json, write_rows
from rnp.io.models import load_model
from rnp.io.tensors import load_mask
from rnp.reporting.plots import before_after, pruning_curve


@command(
    "evaluate",
    Evaluate,
    seed=False,
    outputs={"defended": "the folder of the models that other defenses repaired"},
    inputs=("test", "triggered", "benign", "model", "unlearned", "masks", "pruned"),
)
def evaluate(options: Evaluate, *, files: Files) -> None:
    """Write metrics, the sweep over test images and the oracle point to REPORT."""
    attack = read_json(files.triggered / "attack.json")
    sets = EvaluationSets(
        load_images(files.test), load_images(files.triggered / "test"), attack["target_label"]
    )
    paths = {
        "backdoored": files.model,
        "rnp": files.pruned / "model.safetensors",
        "unlearned": files.unlearned / "model.safetensors",
        "recovered": files.masks / "model.safetensors",
        "benign": files.benign,
        **{name: files.defended / f"{name}.safetensors" for name in options.defenses},
    }
    evaluation = evaluate_models(
        ((name, load_model(path)[0]) for name, path in paths.items()),
        load_model(files.model)[0],
        load_pruning_order(files.pruned, files.masks),
        sets,
        options,
    )
    facts = {key: attack[key] for key in ("gate", "gate_reason", "attack", "target_label")}
    metrics = evaluation.metrics() | facts | {"model": sha256(files.model)}
    write_json(files.report / "metrics.json", metrics)
    write_rows(files.report / "sweep.csv", evaluation.sweep)
    pruning_curve(
        files.report / "pruning.png",
        evaluation.sweep,
        chosen=evaluation.pruning.pruned,
        oracle=evaluation.oracle_pruned,
        n=min(options.sweep_images, len(sets.triggered)),
    )
    rows = [{"model": name, **scores.flat()} for name, scores in evaluation.scores.items()]
    before_after(files.report / "models.png", rows)


def load_pruning_order(pruned: Path, masks: Path) -> PruningOrder:
    """What `prune` and `recover` wrote."""
    pruning = read_json(pruned / "order.json")
    neurons = [(layer, index) for layer, index in pruning["order"]]
    return PruningOrder(neurons, load_mask(masks / "mask.safetensors"), pruning["pruned"])
