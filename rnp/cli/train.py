"""Train the backdoored model, make the triggered test set, and test whether the backdoor is
real.
"""

from __future__ import annotations

from pathlib import Path

from rnp.attacks.base import backdoored_test_set, covered_test_set
from rnp.cli.options import command, generator
from rnp.cli.progress import progress
from rnp.io import (
    History,
    load_images,
    load_model,
    load_poisoned,
    save_array,
    save_images,
    save_model,
    save_trigger,
    sha256,
    whole,
    write_json,
)
from rnp.metrics import EarlyLoss, Recorded, gate_reason, score
from rnp.models.build import Architecture
from rnp.models.parallel import leads
from rnp.plots import training_curves
from rnp.registry import load
from rnp.training import Train, accuracy, default_device


@command(
    "train",
    Architecture,
    Train,
    inputs=("pool", "poisoned", "test", "twin"),
    outs=("out", "triggered"),
    parallel=True,
)
def train(
    architecture: Architecture,
    recipe: Train,
    *,
    pool: Path,
    poisoned: Path,
    test: Path,
    twin: Path,
    out: Path,
    triggered: Path,
    report: Path,
    seed: int,
) -> None:
    """Write the backdoored model to OUT; to TRIGGERED what detectors are scored with.

    That is the test images with the trigger on, the trigger, the gate, and the mean loss of each
    training image early in the run.
    """
    clean = load_images(pool)
    changes, options = load_poisoned(poisoned)
    name = options.pop("attack")
    attack = load("attack", name)(**options)
    data, rng = changes.apply(clean), generator(seed, "train")
    model = architecture.build_for(data, rng=rng).to(default_device())
    losses = EarlyLoss(len(data), recipe.epochs, default_device())
    recorded = Recorded(**vars(recipe), losses=losses)
    with (
        History(report / "history.csv") as history,
        progress("train", recipe.epochs, history) as on_epoch,
    ):
        model, trigger = attack.train(
            model, data, changes.trigger, recorded, rng=rng, on_epoch=on_epoch
        )
    if not leads():
        return
    tests = load_images(test)
    attacked = backdoored_test_set(trigger, tests, attack.target)
    scores = score(model, tests, attacked, attack.target, precision=recipe.precision)
    benign, _, _ = load_model(twin)
    accuracy_twin = accuracy(benign, tests, precision=recipe.precision)
    reason = gate_reason(scores, accuracy_twin, attack.gate)
    facts = {
        "gate": not reason,
        "gate_reason": reason,
        "clean_accuracy_twin": accuracy_twin,
        "n_clean": len(tests),
        "n_triggered": len(attacked),
    }
    if attack.cover_rate:
        covered = covered_test_set(attack, trigger, tests, rng=generator(seed, "train/covers"))
        facts["cover_accuracy"] = accuracy(model, covered, precision=recipe.precision)

    save_model(out, model, architecture, data.classes)
    with whole(triggered) as draft:
        save_images(draft / "test", attacked)
        save_trigger(draft / "trigger.safetensors", trigger)
        save_array(draft / "losses.npy", losses.mean())
        write_json(draft / "attack.json", {"attack": name, "target_label": attack.target, **facts})
    training_curves(report / "training.png", {name: report / "history.csv"})
    write_json(report / "metrics.json", {**scores.flat(), **facts, "model": sha256(out)})
