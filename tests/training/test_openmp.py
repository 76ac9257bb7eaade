"""Waiting threads sleep soon in all that we start; what the user has said stands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rnp.training.openmp import SPINS, VARIABLES

ROOT = Path(__file__).parents[2]
TORCH = """
import os
print(os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY"), flush=True)
os._exit(0)
"""


def heard(folder, *command, **user):
    """What PyTorch would find in the environment when it is loaded."""
    (folder / "torch.py").write_text(TORCH)
    own = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env = own | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"} | user
    done = subprocess.run(
        [sys.executable, *command], env=env, cwd=folder, capture_output=True, text=True
    )
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "stages.benign"],
        ["-m", "stages.detect"],
        ["-m", "rnp", "unlearn", "--help"],
        ["-c", "from rnp import purify"],
        ["-m", "benchmarks.measure"],
        ["-m", "benchmarks.steps"],
        ["-m", "benchmarks.architectures"],
        ["-c", "import benchmarks.reference_rnp"],
        ["-m", "pytest", "-s", str(ROOT / "tests/test_types.py")],
    ],
    ids=lambda command: command[1],
)
def test_it_is_set_before_torch_is_loaded(command, tmp_path):
    assert heard(tmp_path, *command) == f"{SPINS} None"


@pytest.mark.parametrize(
    "user, found",
    [({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")],
)
def test_the_user_has_the_last_word(user, found, tmp_path):
    assert heard(tmp_path, "-m", "stages.benign", **user) == found
