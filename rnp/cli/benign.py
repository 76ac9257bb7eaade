"""Train a benign model on the attacker's training set: the control of every comparison."""

from __future__ import annotations

from rnp.cli.options import Files, command
from rnp.io.datasets import load_images
from rnp.io.files import write_json
from rnp.io.history import History
from rnp.io.models import save_model
from rnp.models.build import Architecture
from rnp.reporting.progress import progress
from rnp.seeds import generator
from rnp.training.device import chosen_precision, default_device
from rnp.training.distributed import is_main_process
from rnp.training.predict import accuracy
from rnp.training.recipe import Train


@command("benign", Architecture, Train, inputs=("pool", "test"), parallel=True)
def benign(architecture: Architecture, recipe: Train, *, files: Files, seed: int) -> None:
    """Train a benign model on the attacker's training set, and write it to OUT."""
    data = load_images(files.pool)
    rng = generator(seed, "twin")  # the name it had when the published rows were made
    model = architecture.build_for(data, rng=rng).to(default_device())
    with (
        History(files.report / "history.csv") as history,
        progress("benign", recipe.epochs, history) as on_epoch,
    ):
        recipe(model, data, rng=rng, on_epoch=on_epoch)
    if not is_main_process():
        return
    save_model(files.out, model, architecture, data.classes)
    measured = accuracy(model, load_images(files.test), precision=chosen_precision())
    write_json(files.report / "metrics.json", {"clean_accuracy": measured})
