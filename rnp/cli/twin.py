"""Train a benign model on the attacker's training set: surrogate of some attacks, control of every
table.
"""

from __future__ import annotations

from pathlib import Path

from rnp.cli.options import command, generator
from rnp.cli.progress import progress
from rnp.io import History, load_images, save_model, write_json
from rnp.models.build import Architecture
from rnp.models.parallel import leads
from rnp.training import Train, accuracy, default_device


@command("twin", Architecture, Train, inputs=("pool", "test"), parallel=True)
def twin(
    architecture: Architecture,
    recipe: Train,
    *,
    pool: Path,
    test: Path,
    out: Path,
    report: Path,
    seed: int,
) -> None:
    """Write the benign model to OUT."""
    data, rng = load_images(pool), generator(seed, "twin")
    model = architecture.build_for(data, rng=rng).to(default_device())
    with (
        History(report / "history.csv") as history,
        progress("twin", recipe.epochs, history) as on_epoch,
    ):
        recipe(model, data, rng=rng, on_epoch=on_epoch)
    if not leads():
        return
    save_model(out, model, architecture, data.classes)
    write_json(
        report / "metrics.json",
        {"clean_accuracy": accuracy(model, load_images(test), precision=recipe.precision)},
    )
