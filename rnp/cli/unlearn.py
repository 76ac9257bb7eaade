"""Maximise the model's error on the defence set."""

from __future__ import annotations

from pathlib import Path

from rnp.cli.concerns import warn
from rnp.cli.options import command, generator
from rnp.cli.progress import progress
from rnp.errors import UserError
from rnp.io import History, load_defence_set, load_model, save_model, whole, write_json, write_rows
from rnp.masks import maskable
from rnp.plots import unlearning_curve
from rnp.training import steps_per_epoch
from rnp.unlearn import Unlearn


@command("unlearn", Unlearn, inputs=("model", "defence"))
def unlearn(
    options: Unlearn, *, model: Path, defence: Path, out: Path, report: Path, seed: int
) -> None:
    """Write to OUT the unlearned model and checkpoints of the ascent, for detection."""
    victim, architecture, classes = load_model(model)
    maskable(victim)  # says now what recovery would say later
    clean = warn(victim, classes, load_defence_set(defence)).train
    total = options.epochs * steps_per_epoch(len(clean), options.batch_size)
    with (
        History(report / "history.csv") as history,
        progress("unlearn", total, history) as on_epoch,
    ):
        unlearned = options(victim, clean, rng=generator(seed, "unlearn"), on_epoch=on_epoch)
    if not unlearned.trajectory:
        raise UserError(
            "the model forgot too much at the smallest step of the ascent; lower unlearn.lr, or set"
            " unlearn.largest_drop to 0"
        )
    with whole(out) as draft:
        save_model(draft / "model.safetensors", unlearned.model, architecture, classes)
        for level, state in unlearned.checkpoints.items():
            victim.load_state_dict(state)
            save_model(draft / f"accuracy_{level}.safetensors", victim, architecture, classes)
        write_rows(draft / "trajectory.csv", [row.row() for row in unlearned.trajectory])
    unlearning_curve(report / "unlearning.png", unlearned.trajectory, classes, unlearned.stop_step)
    if not unlearned.reached:
        print(
            f"warning: accuracy never fell to {options.stop_accuracy:g} in"
            f" {len(unlearned.trajectory)} steps; going on with the least accurate model; raise"
            " unlearn.epochs or unlearn.lr"
        )
    last = unlearned.trajectory[-1]
    write_json(
        report / "metrics.json",
        {
            "reached": unlearned.reached,
            "stop_step": unlearned.stop_step,
            "accuracy": unlearned.accuracy,
            "learning_rate": last.learning_rate,
            "retries": unlearned.retries,
            "steps": last.step,
            "end_accuracy": last.accuracy,
            "end_top_share": max(last.extra.values()),
        },
    )
