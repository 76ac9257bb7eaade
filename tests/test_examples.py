"""The examples run as they are, and print what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def outputs():
    """What each example prints, by its name. They run side by side: each takes one core."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    processes = {
        path.stem: subprocess.Popen(
            [sys.executable, path], env=environment, stdout=subprocess.PIPE, text=True
        )
        for path in EXAMPLES
    }
    outputs = {name: process.communicate()[0] for name, process in processes.items()}
    assert all(process.returncode == 0 for process in processes.values()), outputs
    return outputs


def numbers(output):
    """The numbers of each line, by its first word."""
    lines = [line.split(maxsplit=1) for line in output.splitlines()]
    return {
        word: [float(number) for number in re.findall(r"\d+\.\d+", rest)] for word, rest in lines
    }


def test_there_are_three():
    names = [path.stem for path in EXAMPLES]
    assert names == ["compare_defenses", "detect_triggered_images", "remove_backdoor"]


def test_the_backdoor_is_removed_at_little_cost(outputs):
    rows = numbers(outputs["remove_backdoor"])
    accuracy, success = rows["backdoored"]
    accuracy_after, success_after = rows["repaired"]
    assert success > 0.9 and success_after < 0.2
    assert accuracy > 0.95 and accuracy_after > accuracy - 0.05


def test_pruning_removes_what_fine_tuning_leaves(outputs):
    rows = numbers(outputs["compare_defenses"])
    success = {name: values[1] for name, values in rows.items() if name != "defense"}
    assert success.keys() == {"ft", "bnp", "rnp"}
    assert success["ft"] > 0.9 and success["bnp"] < 0.2 and success["rnp"] < 0.2


def test_triggered_images_are_found(outputs):
    rows = numbers(outputs["detect_triggered_images"])
    assert rows["mahalanobis"][0] > 0.95 and rows["unlearned_confidence"][0] > 0.9
    assert rows["strip"][0] > 0.7
