"""Maximize the model's error on the defense set."""

from __future__ import annotations

from rnp.cli.options import Files, command
from rnp.errors import UserError
from rnp.evaluation.checks import check_and_warn
from rnp.io.datasets import load_defense_set
from rnp.io.files import atomic_write, write_json, write_rows
from rnp.io.history import History
from rnp.io.models import load_model, save_model
from rnp.neurons.masks import maskable
from rnp.reporting.plots import unlearning_curve
from rnp.reporting.progress import progress
from rnp.reporting.stages import PER_IMAGE
from rnp.seeds import generator
from rnp.training.loop import steps_per_epoch
from rnp.training.work import count_pass
from rnp.unlearn import Unlearn


@command("unlearn", Unlearn, inputs=("model", "defense"))
def unlearn(options: Unlearn, *, files: Files, seed: int) -> None:
    """Maximize the model's error on the defense set.

    OUT gets the unlearned model and checkpoints of the ascent, for detection.
    """
    network, architecture, classes = load_model(files.model)
    maskable(network)  # fails now where recovery would fail later
    clean = check_and_warn(network, classes, load_defense_set(files.defense)).train
    total = options.epochs * steps_per_epoch(len(clean), options.batch_size)
    with (
        History(files.report / "history.csv") as history,
        progress("unlearn", total, history) as on_epoch,
    ):
        unlearned = options(network, clean, rng=generator(seed, "unlearn"), on_epoch=on_epoch)
    if not unlearned.trajectory:
        raise UserError(
            "the model forgot too much at the smallest step of the ascent; lower unlearn.lr, or set"
            " unlearn.max_drop_per_step to 0"
        )
    with atomic_write(files.out) as draft:
        save_model(draft / "model.safetensors", unlearned.model, architecture, classes)
        for level, state in unlearned.checkpoints.items():
            network.load_state_dict(state)
            save_model(draft / f"accuracy_{level}.safetensors", network, architecture, classes)
        write_rows(draft / "trajectory.csv", [row.row() for row in unlearned.trajectory])
    unlearning_curve(
        files.report / "unlearning.png", unlearned.trajectory, classes, unlearned.stop_step
    )
    if not unlearned.reached:
        print(
            f"warning: accuracy never fell to {options.stop_accuracy:g} in"
            f" {len(unlearned.trajectory)} steps; continuing with the least accurate model; raise"
            " unlearn.epochs or unlearn.lr"
        )
    work = {PER_IMAGE: count_pass(unlearned.model, clean.images)}
    write_json(files.report / "metrics.json", unlearned.metrics() | work)
