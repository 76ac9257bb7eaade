"""Speed and memory of everything, and studies of results; `python -m benchmarks.NAME` starts one."""

import rnp  # before PyTorch: it says how threads wait
