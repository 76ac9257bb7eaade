"""Random number generators, made from the seed of a run."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """The generator for one purpose; it depends on the seed and the purpose alone."""
    import torch  # loaded here, so that the help of a command stays fast

    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def root(seed: int) -> torch.Generator:
    """The generator of the seed itself; pass it to `child` to derive the others."""
    import torch

    return torch.Generator().manual_seed(seed)


def child(rng: torch.Generator, name: str) -> torch.Generator:
    """A generator for the part `name` of the work; the state of `rng` does not change.

    It depends on the seed of `rng` alone: `child(root(seed), name)` draws the same numbers as
    `generator(seed, name)`.
    """
    return generator(rng.initial_seed(), name)
