"""Narrow networks train on processors without AVX512, where some convolutions of few channels
write past their memory.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("what", ["shortcuts", "networks"])
def test_narrow(what):
    """As on a processor with AVX2 alone; all other tests take what this processor has."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, ROOT / "tests/helpers/narrow.py", what],
        env=env,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
