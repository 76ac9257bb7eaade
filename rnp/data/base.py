"""What a data set is, and how it is split between attacker, defender and test."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters
from rnp.registry import Method
from rnp.types import DefenseSet, ImageSet


@dataclass(frozen=True, kw_only=True)
class Dataset(Method, ABC):
    """A source of a training set and a test set."""

    @abstractmethod
    def load(self, root: Path, *, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        """Training and test images. `root` is where data sets lie; `rng` serves those that are
        generated or split.

        Raises: UserError when files are missing or corrupt, naming them and the way out.
        """


@dataclass(frozen=True)
class Splits:
    """Who holds what. `pool` is what the attacker may poison and train on."""

    pool: ImageSet
    defense: DefenseSet
    test: ImageSet


@dataclass(frozen=True, kw_only=True)
class Split(Hyperparameters):
    """How many clean images the defender holds, and whether the attacker trained on them too."""

    section: ClassVar[str] = "data"

    defense_train: Annotated[int, Ge(1), "clean images that the defender optimizes on"] = 500
    defense_val: Annotated[int, Ge(1), "clean images that the defender chooses with"] = 500
    from_pool: Annotated[
        bool, "draw them from the training pool, as the paper did, instead of reserving them"
    ] = False

    def __call__(self, train: ImageSet, test: ImageSet, *, rng: torch.Generator) -> Splits:
        """Stratified by class: equally large classes get equal shares, to within one image (two in
        `val` where the numbers are no multiples of the number of classes). Drawn at random: which
        images.

        Raises: UserError when the training set is too small.
        """
        wanted = self.defense_train + self.defense_val
        if not self.from_pool and wanted >= len(train):
            raise UserError(
                f"defense_train + defense_val = {wanted} leaves nothing of {len(train)} training"
                " images; ask for fewer"
            )
        order = interleave(train.labels, len(train.classes), rng)
        if wanted > len(order):
            raise UserError(
                f"defense_train + defense_val = {wanted}, but there are {len(train)} training"
                " images"
            )
        chosen_train, chosen_val = order[: self.defense_train], order[self.defense_train : wanted]
        pool = train if self.from_pool else train.subset(order[wanted:].sort().values)
        return Splits(pool, DefenseSet(train.subset(chosen_train), train.subset(chosen_val)), test)


def interleave(labels: Tensor, classes: int, rng: torch.Generator) -> Tensor:
    """All positions in random order, the classes spread evenly: with equally large ones the first
    `classes` positions hold each class once, the next `classes` again, and so on; with others
    every class has nearly its share of any beginning.
    """
    ranks = torch.empty(len(labels), dtype=torch.float64)
    for label in range(classes):
        members = (labels == label).nonzero().squeeze(1)
        share = (
            torch.randperm(len(members), generator=rng).double()
            + torch.rand(len(members), generator=rng).double()
        )
        ranks[members] = share / max(len(members), 1)
    return ranks.argsort()
