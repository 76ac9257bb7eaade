"""Split a data set between attacker (pool), defender (defense) and test."""

from __future__ import annotations

import os
from pathlib import Path

import click

from rnp.cli.options import Family, Files, command
from rnp.data.base import Dataset, Split
from rnp.io.datasets import save_defense_set, save_images
from rnp.io.files import write_json
from rnp.registry import load
from rnp.seeds import generator


def data_root() -> Path:
    """Where data sets are: `RNP_DATA`, else `data`.

    A relative path counts from DVC's root where there is one, else from the current folder.
    """
    return Path(os.environ.get("DVC_ROOT", ".")) / os.environ.get("RNP_DATA", "data")


def split_images(split: Split, dataset: Dataset, *, files: Files, seed: int) -> None:
    """Split the data set between attacker, defender and test.

    OUT gets the folders pool, defense and test; the attacker never sees the last two.
    """
    train, test = dataset.load(data_root(), rng=generator(seed, "prepare"))
    splits = split(train, test, rng=generator(seed, "split"))
    save_images(files.out / "pool", splits.pool)
    save_defense_set(files.out / "defense", splits.defense)
    save_images(files.out / "test", splits.test)
    sizes = {
        "classes": len(train.classes),
        "pool": len(splits.pool),
        "defense_train": len(splits.defense.train),
        "defense_val": len(splits.defense.val),
        "test": len(test),
    }
    write_json(files.report / "metrics.json", sizes)


def prepare_command(name: str) -> click.Command:
    """The command for the data set `name`."""
    return command(name, Split, load("dataset", name), precision=False)(split_images)


prepare = Family(
    "prepare",
    family="dataset",
    make=prepare_command,
    help="Split a data set between attacker (pool), defender (defense) and test.",
)
