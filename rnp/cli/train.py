"""Train the backdoored model, make the triggered test set, and test whether it is backdoored."""

from __future__ import annotations

from rnp.attacks.base import backdoored_test_set, covered_test_set
from rnp.cli.options import Files, command
from rnp.evaluation.metrics import gate_failure, score
from rnp.io.datasets import load_images, load_poisoned, save_array, save_images, save_trigger
from rnp.io.files import atomic_write, sha256, write_json
from rnp.io.history import History
from rnp.io.models import load_model, save_model
from rnp.models.build import Architecture
from rnp.registry import build
from rnp.reporting.plots import training_curves
from rnp.reporting.progress import progress
from rnp.seeds import generator
from rnp.training.device import chosen_precision, default_device
from rnp.training.distributed import is_main_process
from rnp.training.loss_recorder import EarlyLossRecorder, TrainWithLosses
from rnp.training.predict import accuracy
from rnp.training.recipe import Train


@command(
    "train",
    Architecture,
    Train,
    inputs=("pool", "poisoned", "test", "benign"),
    outputs={"out": "the backdoored model", "triggered": "what detectors are scored with"},
    parallel=True,
)
def train(architecture: Architecture, recipe: Train, *, files: Files, seed: int) -> None:
    """Train the backdoored model, and test whether its backdoor is real.

    OUT gets the model. TRIGGERED gets the test images with the trigger on, the trigger, the gate,
    and the mean loss of each training image early in the run.
    """
    clean = load_images(files.pool)
    changes, options = load_poisoned(files.poisoned)
    name = options.pop("attack")
    attack = build("attack", name, options)
    data = changes.apply(clean)
    rng = generator(seed, "train")
    model = architecture.build_for(data, rng=rng).to(default_device())
    losses = EarlyLossRecorder(len(data), recipe.epochs, default_device())
    recorded = TrainWithLosses(**vars(recipe), losses=losses)
    with (
        History(files.report / "history.csv") as history,
        progress("train", recipe.epochs, history) as on_epoch,
    ):
        model, trigger = attack.train(
            model, data, changes.trigger, recorded, rng=rng, on_epoch=on_epoch
        )
    if not is_main_process():
        return
    tests = load_images(files.test)
    attacked = backdoored_test_set(trigger, tests, attack.target)
    precision = chosen_precision()
    scores = score(model, tests, attacked, attack.target, precision=precision)
    benign_accuracy = accuracy(load_model(files.benign)[0], tests, precision=precision)
    failure = gate_failure(scores, benign_accuracy, attack.min_asr)
    facts = {
        "gate": not failure,
        "gate_reason": failure,
        "clean_accuracy_benign": benign_accuracy,
        "n_clean": len(tests),
        "n_triggered": len(attacked),
    }
    if attack.cover_rate:
        covered = covered_test_set(attack, trigger, tests, rng=generator(seed, "train/covers"))
        facts["cover_accuracy"] = accuracy(model, covered, precision=precision)

    save_model(files.out, model, architecture, data.classes)
    with atomic_write(files.triggered) as draft:
        save_images(draft / "test", attacked)
        save_trigger(draft / "trigger.safetensors", trigger)
        save_array(draft / "losses.npy", losses.mean())
        write_json(draft / "attack.json", {"attack": name, "target_label": attack.target, **facts})
    training_curves(files.report / "training.png", {name: files.report / "history.csv"})
    write_json(
        files.report / "metrics.json", {**scores.flat(), **facts, "model": sha256(files.out)}
    )
