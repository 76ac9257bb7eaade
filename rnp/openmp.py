"""How threads wait for one another: for a moment only, so that rnp lives beside other processes."""

import os

SPINS = 2000  # turns of a loop; libgomp's own number lasts milliseconds, many layers of a small network


def wait_briefly() -> None:
    """Let a thread that waits for others sleep soon. To be called before PyTorch is loaded; results do not change.

    libgomp, which PyTorch's wheels bring, lets waiting threads spin, and takes the core from the very thread that they wait for
    where another process is busy. `GOMP_SPINCOUNT` or `OMP_WAIT_POLICY`, if the user has set one, stays as it is.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
