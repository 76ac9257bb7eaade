"""Minimize the error of the unlearned model again, one mask per neuron free."""

from __future__ import annotations

import math

from rnp.cli.options import Files, command
from rnp.evaluation.checks import require_usable
from rnp.io.datasets import load_defense_set
from rnp.io.files import atomic_write, write_json, write_rows
from rnp.io.history import History
from rnp.io.models import load_model, save_model
from rnp.io.tensors import mask_rows, save_mask
from rnp.recover import Recover
from rnp.reporting.plots import mask_histogram
from rnp.reporting.progress import progress
from rnp.seeds import generator
from rnp.training.loop import steps_per_epoch
from rnp.training.predict import accuracy


@command("recover", Recover, inputs=("unlearned", "defense"))
def recover(options: Recover, *, files: Files, seed: int) -> None:
    """Minimize the error of the unlearned model again, one mask per neuron.

    OUT gets the neuron mask (safetensors and CSV) and the recovered model.
    """
    model, architecture, classes = load_model(files.unlearned / "model.safetensors")
    defense_set = load_defense_set(files.defense)
    require_usable(defense_set, classes, len(model.mean.flatten()))
    clean = defense_set.train
    total = math.ceil(options.steps / steps_per_epoch(len(clean), options.batch_size))
    with (
        History(files.report / "history.csv") as history,
        progress("recover", total, history) as on_epoch,
    ):
        recovered = options(model, clean, rng=generator(seed, "recover"), on_epoch=on_epoch)
    with atomic_write(files.out) as draft:
        save_mask(draft / "mask.safetensors", recovered.mask)
        write_rows(draft / "mask.csv", mask_rows(recovered.mask, model))
        save_model(draft / "model.safetensors", recovered.model, architecture, classes)
    mask_histogram(files.report / "masks.png", recovered.mask)
    metrics = {"accuracy": accuracy(recovered.model, clean)} | recovered.metrics()
    write_json(files.report / "metrics.json", metrics)
