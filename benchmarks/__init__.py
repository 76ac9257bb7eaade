"""Speed and memory of everything; `python -m benchmarks.NAME` starts one."""

import rnp  # before PyTorch: it says how threads wait
