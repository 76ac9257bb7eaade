"""Methods by file name: `rnp/attacks/wanet.py` is the attack `wanet`. Listing imports no method."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters

FAMILIES = {
    "attack": "attacks",
    "dataset": "data",
    "defense": "defenses",
    "triggers": "detection/triggers",
    "labels": "detection/labels",
    "samples": "detection/samples",
}


@dataclass(frozen=True, kw_only=True)
class Method(Hyperparameters):
    """The base class of attacks, data sets, defenses and detectors, which are selected by name.

    Subclasses are frozen dataclasses whose fields are hyperparameters.
    """

    @property
    def name(self) -> str:
        """The name of the file that defines the method."""
        return type(self).__module__.rpartition(".")[2]


def names(family: str) -> list[str]:
    """The names of the methods of a family, sorted; `family` is a key of `FAMILIES`."""
    files = (Path(__file__).parent / FAMILIES[family]).glob("*.py")
    return sorted(file.stem for file in files if file.stem not in ("__init__", "base"))


def load(family: str, name: str) -> type[Any]:
    """The class that the file of the method `name` defines.

    Raises: UserError when there is no such file.
    """
    known = names(family)
    if name not in known:
        raise UserError(f"unknown {family} {name!r}{suggest(name, known)}")
    module = importlib.import_module(f"rnp.{FAMILIES[family].replace('/', '.')}.{name}")
    (method,) = methods_in(module)  # one file, one method
    return method


def build(family: str, name: str, options: dict[str, Any]) -> Any:
    """The method `name` with the given hyperparameters.

    Raises: UserError when there is no such method or hyperparameter, or a value is out of range.
    """
    method = load(family, name)
    known = [field.name for field in dataclasses.fields(method)]
    for option in options:
        if option not in known:
            raise UserError(f"unknown option {name}.{option}{suggest(option, known)}")
    return method(**options)


def methods_in(module: ModuleType) -> list[type[Method]]:
    """The methods that a module itself defines."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]


def suggest(word: str, known: list[str]) -> str:
    """The end of an error message: the nearest known word, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; choose from {', '.join(known)}"
