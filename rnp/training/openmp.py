"""How threads wait for one another: for a moment only, so that rnp lives beside other processes."""

import os

VARIABLES = {
    "GOMP_SPINCOUNT",
    "OMP_WAIT_POLICY",
}  # of the environment, either of which says how threads wait
SPINS = 2000  # turns of a loop, tens of microseconds; libgomp's own number is 300,000


def wait_briefly() -> None:
    """Let a thread that waits for others sleep soon. To be called before PyTorch is loaded;
    results do not change.

    libgomp, which PyTorch's wheels bring, lets waiting threads spin for milliseconds. Where
    another process is busy they can take the core from the very thread that they wait for. With
    30,000 or 100,000 turns a small network then took three to five times as long on one machine
    and hardly advanced on another, where libgomp's own number did no better. 2,000 turns are
    within a few percent of it alone, and beside a busy process within a fifth of no spinning,
    which alone takes half as long again. Where the user has set one of `VARIABLES`, all stays as
    it is.
    """
    if not VARIABLES & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
