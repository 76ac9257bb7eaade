"""Speed and memory of everything; `python -m benchmarks.NAME` starts one."""

import rnp  # before PyTorch: it sets how threads wait
