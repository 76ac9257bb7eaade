"""The base class of data sets, and their split between attacker, defender and test."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters
from rnp.registry import Method
from rnp.types import DefenseSet, ImageSet, Indices, Labels


@dataclass(frozen=True, kw_only=True)
class Dataset(Method, ABC):
    """A source of a training set and a test set."""

    @abstractmethod
    def load(self, root: Path, *, rng: torch.Generator) -> tuple[ImageSet, ImageSet]:
        """Training and test images.

        Args:
            root: the folder of all data sets.
            rng: for data sets that are generated or split at random.

        Raises: UserError when files are missing or corrupt, naming them and the way out.
        """

    def fingerprint(self, root: Path) -> str:
        """A short digest that changes when the files under `root` do; empty for generated images.

        No image is decoded.

        Raises: UserError when files are missing that `load` needs and does not fetch.
        """
        return ""


def digest_files(folder: Path, files: Iterable[Path]) -> str:
    """A digest of name, size and modification time of each file, whatever their order.

    Names are relative to `folder`.
    """
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in files):
        status = file.stat()
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Splits:
    """The images of each party; `pool` is what the attacker may poison and train on."""

    pool: ImageSet
    defense: DefenseSet
    test: ImageSet


@dataclass(frozen=True, kw_only=True)
class Split(Hyperparameters):
    """How many clean images the defender has, and whether the attacker trained on them too."""

    section: ClassVar[str] = "data"

    defense_train: Annotated[int, Ge(1), "clean images that the defender optimizes on"] = 500
    defense_val: Annotated[int, Ge(1), "clean images that the defender chooses with"] = 500
    from_pool: Annotated[
        bool, "draw them from the training pool, as the paper did, instead of reserving them"
    ] = False

    def __call__(self, train: ImageSet, test: ImageSet, *, rng: torch.Generator) -> Splits:
        """Split the training set; stratified by class.

        Equally large classes get equal shares, to within one image (two in `val` where the numbers
        are no multiples of the number of classes). Drawn at random: which images.

        Raises: UserError when the training set is too small.
        """
        count = self.defense_train + self.defense_val
        if not self.from_pool and count >= len(train):
            raise UserError(
                f"defense_train + defense_val = {count} leaves nothing of {len(train)} training"
                " images; ask for fewer"
            )
        if count > len(train):
            raise UserError(
                f"defense_train + defense_val = {count}, but there are {len(train)} training images"
            )
        order = interleave(train.labels, len(train.classes), rng)
        optimize = train.subset(order[: self.defense_train])
        choose = train.subset(order[self.defense_train : count])
        pool = train if self.from_pool else train.subset(order[count:].sort().values)
        return Splits(pool, DefenseSet(optimize, choose), test)


def interleave(labels: Labels, classes: int, rng: torch.Generator) -> Indices:
    """All positions in random order, with the classes spread evenly.

    With equally large classes the first `classes` positions have one image of each class, so have
    the next `classes`, and so on; with others every class has nearly its share of any beginning.
    """
    ranks = torch.empty(len(labels), dtype=torch.float64)
    for label in range(classes):
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=rng).double()
        jitter = torch.rand(len(members), generator=rng).double()
        ranks[members] = (order + jitter) / max(len(members), 1)
    return ranks.argsort()
