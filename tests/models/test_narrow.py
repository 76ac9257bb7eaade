"""Narrow networks train without AVX512, where some convolutions write past their memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("part", ["shortcuts", "networks"])
def test_narrow(part):
    """In a process limited to AVX2, because a crash ends it; other tests use any instructions."""
    process = subprocess.run(
        [sys.executable, ROOT / "tests/helpers/narrow.py", part],
        env=os.environ | {"PYTHONPATH": str(ROOT), "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
    )
    assert (process.returncode, process.stdout.strip()) == (0, "done"), process.stderr
