"""Split a data set between attacker (pool), defender (defence) and test."""

from __future__ import annotations

import os
from pathlib import Path

from rnp.cli.choice import ChooseSet
from rnp.cli.options import command, generator
from rnp.data.base import Dataset, Split
from rnp.io import save_defence_set, save_images, write_json
from rnp.registry import load, names

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
    """Write OUT/pool, OUT/defence and OUT/test; the last two are never seen by the attacker."""
    chosen = next(each for each in sets if each.name == choice.set)
    train, test = chosen.load(data_root(), rng=generator(seed, "prepare"))
    splits = split(train, test, rng=generator(seed, "split"))
    save_images(out / "pool", splits.pool)
    save_defence_set(out / "defence", splits.defence)
    save_images(out / "test", splits.test)
    write_json(
        report / "metrics.json",
        {
            "classes": len(train.classes),
            "pool": len(splits.pool),
            "defence_train": len(splits.defence.train),
            "defence_val": len(splits.defence.val),
            "test": len(test),
        },
    )
