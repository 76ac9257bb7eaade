"""Random number generators of a seed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator for one purpose: different for every purpose, the same for every run of a seed."""
    import torch  # loaded here, so that the help of a command stays fast

    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def root(seed: int) -> torch.Generator:
    """The generator of a seed itself, of which all others are children."""
    import torch

    return torch.Generator().manual_seed(seed)


def child(rng: torch.Generator, name: str) -> torch.Generator:
    """A generator for a part of the work of `rng`, which itself does not move.

    It depends on the seed of `rng` alone: `child(root(seed), name)` draws what
    `generator(seed, name)` draws.
    """
    return generator(rng.initial_seed(), name)
