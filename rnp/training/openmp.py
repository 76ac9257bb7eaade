"""How long waiting OpenMP threads spin, so that `rnp` runs well beside other processes."""

import os

VARIABLES = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
"""Environment variables that set how threads wait."""
SPINS = 2000
"""Turns of the waiting loop, tens of microseconds; the default of libgomp is 300,000."""


def wait_briefly() -> None:
    """Make waiting threads sleep early; call it before PyTorch is loaded. Results do not change.

    libgomp, which comes with PyTorch, lets waiting threads spin for milliseconds. While another
    process is busy, they can take the core from the very thread that they wait for. With 30,000
    or 100,000 turns a small network then took three to five times as long on one machine and
    hardly advanced on another, where the default did no better. 2,000 turns cost a few percent
    on an idle machine, and beside a busy process at most a fifth more than no spinning, which on
    an idle machine takes half as long again. If the user has set one of `VARIABLES`, nothing is
    changed.
    """
    if not VARIABLES & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
