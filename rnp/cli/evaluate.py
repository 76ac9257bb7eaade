"""Measure CA, ASR, RA and DER of every model.

It is the only step after training that reads the test set and the triggers.
"""

from __future__ import annotations

from pathlib import Path

from rnp.cli.options import command
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
def evaluate(
    options: Evaluate,
    *,
    test: Path,
    triggered: Path,
    benign: Path,
    model: Path,
    unlearned: Path,
    masks: Path,
    pruned: Path,
    defended: Path,
    report: Path,
) -> None:
    """Write metrics, the sweep over test images and the oracle point to REPORT."""
    attack = read_json(triggered / "attack.json")
    sets = EvaluationSets(
        load_images(test), load_images(triggered / "test"), attack["target_label"]
    )
    paths = {
        "backdoored": model,
        "rnp": pruned / "model.safetensors",
        "unlearned": unlearned / "model.safetensors",
        "recovered": masks / "model.safetensors",
        "benign": benign,
        **{name: defended / f"{name}.safetensors" for name in options.defenses},
    }
    evaluation = evaluate_models(
        ((name, load_model(path)[0]) for name, path in paths.items()),
        load_model(model)[0],
        load_pruning_order(pruned, masks),
        sets,
        options,
    )
    facts = {key: attack[key] for key in ("gate", "gate_reason", "attack")}
    metrics = evaluation.metrics() | facts | {"model": sha256(model)}
    write_json(report / "metrics.json", metrics)
    write_rows(report / "sweep.csv", evaluation.sweep)
    pruning_curve(
        report / "pruning.png",
        evaluation.sweep,
        chosen=evaluation.pruning.pruned,
        oracle=evaluation.oracle_pruned,
        n=min(options.sweep_images, len(sets.triggered)),
    )
    rows = [{"model": name, **scores.flat()} for name, scores in evaluation.scores.items()]
    before_after(report / "models.png", rows)


def load_pruning_order(pruned: Path, masks: Path) -> PruningOrder:
    """What `prune` and `recover` wrote."""
    pruning = read_json(pruned / "order.json")
    neurons = [(layer, index) for layer, index in pruning["order"]]
    return PruningOrder(neurons, load_mask(masks / "mask.safetensors"), pruning["pruned"])
