"""Keep freed memory in the process, which makes convolutions on the CPU up to twice as fast."""

import ctypes
import sys

# The numbers of these options in malloc.h.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


def keep_freed_pages() -> None:
    """Configure glibc to keep large freed blocks; does nothing with other C libraries.

    Without this, convolutions on the CPU spend up to half of their time on page faults. Results
    do not change.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)
