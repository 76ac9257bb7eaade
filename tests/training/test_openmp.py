"""Every entry point makes waiting threads sleep early, unless the user has set otherwise."""

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


def settings_at_import(folder, *command, **user):
    """The environment when `command` imports PyTorch, which a stand-in prints."""
    (folder / "torch.py").write_text(TORCH)
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    env = inherited | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"} | user
    process = subprocess.run(
        [sys.executable, *command], env=env, cwd=folder, capture_output=True, text=True
    )
    return process.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "stages.benign"],
        ["-m", "stages.detect"],
        ["-m", "rnp", "unlearn", "--help"],
        ["-c", "from rnp import purify"],
        ["-m", "benchmarks.measure"],
        ["-m", "benchmarks.steps"],
        ["-m", "experiments.architectures"],
        ["-c", "import benchmarks.reference_rnp"],
        ["-m", "pytest", "-s", str(ROOT / "tests/test_types.py")],
    ],
    ids=lambda command: command[1],
)
def test_it_is_set_before_torch_is_loaded(command, tmp_path):
    assert settings_at_import(tmp_path, *command) == f"{SPINS} None"


@pytest.mark.parametrize(
    "user, settings",
    [({"GOMP_SPINCOUNT": "7"}, "7 None"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE")],
)
def test_settings_of_the_user_are_kept(user, settings, tmp_path):
    assert settings_at_import(tmp_path, "-m", "stages.benign", **user) == settings
