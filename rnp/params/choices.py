"""Which data set and which attack: the choices that are made by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from rnp.params.ranges import Hyperparameters
from rnp.registry import names


@dataclass(frozen=True, kw_only=True)
class ChooseSet(Hyperparameters):
    section: ClassVar[str] = "data"

    name: Annotated[Literal[*names("dataset")], "data set; its own options carry its name"] = (
        "shapes"
    )


@dataclass(frozen=True, kw_only=True)
class ChooseAttack(Hyperparameters):
    section: ClassVar[str] = "poison"

    attack: Annotated[Literal[*names("attack")], "attack; its own options carry its name"] = (
        "badnets"
    )
