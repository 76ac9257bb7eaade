"""Measure CA, ASR, RA and DER of every model: the only step after training that reads the test set
and the triggers.
"""

from __future__ import annotations

from pathlib import Path

from rnp.cli.options import command
from rnp.evaluation.metrics import defense_effectiveness
from rnp.evaluation.oracle import Evaluate, choose_oracle, measure, safe_window, sweep
from rnp.io.datasets import load_images
from rnp.io.files import read_json, sha256, write_json, write_rows
from rnp.io.models import load_model
from rnp.io.tensors import load_mask
from rnp.neurons.masks import prune
from rnp.prune import sorted_values
from rnp.reporting.plots import before_after, pruning_curve


@command(
    "evaluate",
    Evaluate,
    seed=False,
    outs=("defended",),
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
    """Write metrics, the sweep over test images and the oracle point; --defended is the folder of
    other repaired models.
    """
    tests, attacked, attack = (
        load_images(test),
        load_images(triggered / "test"),
        read_json(triggered / "attack.json"),
    )
    paths = {
        "backdoored": model,
        "rnp": pruned / "model.safetensors",
        "unlearned": unlearned / "model.safetensors",
        "recovered": masks / "model.safetensors",
        "benign": benign,
        **{name: defended / f"{name}.safetensors" for name in options.defenses},
    }
    scores = {
        name: measure(load_model(path)[0], tests, attacked, attack, options)
        for name, path in paths.items()
    }
    before, after = scores["backdoored"], scores["rnp"]

    victim, _, _ = load_model(model)
    mask = load_mask(masks / "mask.safetensors")
    pruning = read_json(pruned / "order.json")
    order, chosen = [(layer, index) for layer, index in pruning["order"]], pruning["pruned"]
    values = sorted_values(order, mask)
    rows = sweep(victim, order, values, tests, attacked, attack, options, chosen)
    oracle_row = choose_oracle(rows, options.oracle_epsilon)
    oracle = measure(prune(victim, order[: oracle_row["pruned"]]), tests, attacked, attack, options)
    scores["oracle"] = oracle

    write_rows(report / "sweep.csv", rows)
    pruning_curve(
        report / "pruning.png",
        rows,
        chosen=chosen,
        oracle=oracle_row["pruned"],
        n=min(options.sweep_images, len(attacked)),
    )
    before_after(
        report / "models.png", [{"model": name, **each.flat()} for name, each in scores.items()]
    )
    write_json(
        report / "metrics.json",
        {
            **after.flat(),
            "der": defense_effectiveness(before, after),
            **{f"{name}_before": value for name, value in before.flat().items()},
            "clean_accuracy_benign": scores["benign"].clean_accuracy.value,
            "intervals": {name: share.interval() for name, share in vars(after).items()},
            "n_clean": len(tests),
            "n_triggered": len(attacked),
            "gate": attack["gate"],
            "gate_reason": attack["gate_reason"],
            "attack": attack["attack"],
            "model": sha256(model),
            "neurons_pruned": chosen,
            "neurons": sum(len(value) for value in mask.values()),
            "threshold": float(values[chosen - 1]) if chosen else 0.0,
            "safe_window": safe_window(rows),
            "oracle": {**oracle.flat(), "neurons_pruned": oracle_row["pruned"]},
            "models": {
                name: {**each.flat(), "der": defense_effectiveness(before, each)}
                for name, each in scores.items()
            },
        },
    )
