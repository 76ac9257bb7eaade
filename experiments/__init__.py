"""Studies of results; `python -m experiments.NAME` starts one."""

import rnp  # before PyTorch: it says how threads wait
