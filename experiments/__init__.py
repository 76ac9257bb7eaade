"""Studies of results; `python -m experiments.NAME` starts one."""

import rnp  # before PyTorch: it sets how threads wait
