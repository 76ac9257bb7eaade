"""Train a benign model on the attacker's training set: the control of every comparison."""

from __future__ import annotations

from pathlib import Path

from rnp.cli.options import command
from rnp.cli.progress import progress
from rnp.io.datasets import load_images
from rnp.io.files import write_json
from rnp.io.history import History
from rnp.io.models import save_model
from rnp.models.build import Architecture
from rnp.seeds import generator
from rnp.training.device import chosen_precision, default_device
from rnp.training.distributed import is_main_process
from rnp.training.predict import accuracy
from rnp.training.recipe import Train


@command("benign", Architecture, Train, inputs=("pool", "test"), parallel=True)
def benign(
    architecture: Architecture,
    recipe: Train,
    *,
    pool: Path,
    test: Path,
    out: Path,
    report: Path,
    seed: int,
) -> None:
    """Train a benign model on the attacker's training set, and write it to OUT."""
    data = load_images(pool)
    rng = generator(seed, "twin")  # the name it had when the published rows were made
    model = architecture.build_for(data, rng=rng).to(default_device())
    with (
        History(report / "history.csv") as history,
        progress("benign", recipe.epochs, history) as on_epoch,
    ):
        recipe(model, data, rng=rng, on_epoch=on_epoch)
    if not is_main_process():
        return
    save_model(out, model, architecture, data.classes)
    measured = accuracy(model, load_images(test), precision=chosen_precision())
    write_json(report / "metrics.json", {"clean_accuracy": measured})
