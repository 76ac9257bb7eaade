"""The data and the methods that a params.yaml describes."""

from __future__ import annotations

from typing import Any

from rnp.attacks.base import Attack
from rnp.cli.prepare import data_root
from rnp.data.base import Dataset, Split, Splits
from rnp.params.fields import from_section
from rnp.params.read import flatten
from rnp.registry import load
from rnp.seeds import generator
from rnp.training.device import Precision


def configured(kind: type, params: dict, section: str, prefix: str = "", **changes: object) -> Any:
    """`kind` with the options of a section, those that begin with `prefix`, and `changes`."""
    options = dict(flatten(params[section]))
    options |= {f"{prefix}{name}": value for name, value in changes.items()}
    return from_section(kind, options, prefix)


def configured_attack(params: dict, name: str) -> Attack:
    return configured(load("attack", name), params, "attacks", f"{name}.")


def split_data(params: dict, seed: int) -> Splits:
    """The images of each party, as the stage `prepare` splits them."""
    name = params["data"]["name"]
    dataset: Dataset = configured(load("dataset", name), params, "datasets", f"{name}.")
    train, test = dataset.load(data_root(), rng=generator(seed, "prepare"))
    return configured(Split, params, "data")(train, test, rng=generator(seed, "split"))


def precision(params: dict) -> Precision:
    return params.get("precision", "auto")
