"""Choose on the defense set how many neurons to prune, and prune them from the backdoored model."""

from __future__ import annotations

import dataclasses

from rnp.cli.options import Files, command
from rnp.evaluation.checks import require_usable
from rnp.io.datasets import load_defense_set
from rnp.io.files import atomic_write, write_json, write_rows
from rnp.io.models import load_model, save_model
from rnp.io.tensors import load_mask
from rnp.prune import Prune
from rnp.reporting.plots import sweep_curve


@command("prune", Prune, inputs=("model", "masks", "defense"), seed=False)
def prune(options: Prune, *, files: Files) -> None:
    """Prune as many of the most suspicious neurons as the defense set allows.

    OUT gets the repaired model, and the order in which neurons may be pruned.
    """
    network, architecture, classes = load_model(files.model)
    mask = load_mask(files.masks / "mask.safetensors")
    defense_set = load_defense_set(files.defense)
    require_usable(defense_set, classes, len(network.mean.flatten()))
    pruned = options(network, mask, defense_set.all)
    with atomic_write(files.out) as draft:
        save_model(draft / "model.safetensors", pruned.model, architecture, classes)
        write_json(draft / "order.json", {"order": pruned.order, "pruned": pruned.chosen.pruned})
    write_rows(files.report / "sweep.csv", [dataclasses.asdict(point) for point in pruned.sweep])
    sweep_curve(files.report / "sweep.png", pruned.sweep, pruned.chosen)
    write_json(files.report / "metrics.json", pruned.metrics(options.rule, mask))
