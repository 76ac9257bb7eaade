"""Split a data set between attacker (pool), defender (defense) and test."""

from __future__ import annotations

import os
from pathlib import Path

from rnp.cli.options import command
from rnp.data.base import Dataset, Split
from rnp.io.datasets import save_defense_set, save_images
from rnp.io.files import write_json
from rnp.params.choices import ChooseSet
from rnp.registry import load, names
from rnp.seeds import generator

SETS = tuple((load("dataset", name), f"{name}.") for name in names("dataset"))


def data_root() -> Path:
    """`RNP_DATA`, else `data` where DVC's root or the current folder is; a relative one counts
    from there.
    """
    return Path(os.environ.get("DVC_ROOT", ".")) / os.environ.get("RNP_DATA", "data")


@command("prepare", ChooseSet, Split, *SETS)
def prepare(
    choice: ChooseSet, split: Split, *sets: Dataset, out: Path, report: Path, seed: int
) -> None:
    """Write OUT/pool, OUT/defense and OUT/test; the last two are never seen by the attacker."""
    chosen = next(each for each in sets if each.name == choice.set)
    train, test = chosen.load(data_root(), rng=generator(seed, "prepare"))
    splits = split(train, test, rng=generator(seed, "split"))
    save_images(out / "pool", splits.pool)
    save_defense_set(out / "defense", splits.defense)
    save_images(out / "test", splits.test)
    write_json(
        report / "metrics.json",
        {
            "classes": len(train.classes),
            "pool": len(splits.pool),
            "defense_train": len(splits.defense.train),
            "defense_val": len(splits.defense.val),
            "test": len(test),
        },
    )
