"""The child process: what it is given, and what it has loaded when it refuses a file."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from rnp.untrusted.convert import convert
from rnp.untrusted.limits import Limits
from rnp.untrusted.sandbox import child_environment

ROOT = Path(__file__).parents[2]


def test_the_environment_has_the_package_and_no_secrets(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = child_environment()
    assert (Path(environment["PYTHONPATH"]) / "rnp" / "untrusted" / "sandbox.py").is_file()
    assert "SECRET_TOKEN" not in environment
    assert environment["PATH"] == os.environ["PATH"]


def test_it_starts_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    torch.save({"weight": torch.ones(3)}, "a.pth")
    assert convert(Path("a.pth"), Path("b.safetensors")).elements == 3


@pytest.mark.parametrize("hostile", [True, False])
def test_a_hostile_file_is_refused_before_pytorch_is_loaded(tmp_path, hostile):
    """A PyTorch of our own, found first, leaves a mark when it is imported."""
    mark = tmp_path / "mark"
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    checkpoint = tmp_path / "a.pth"
    torch.save(subprocess.Popen if hostile else {"weight": torch.ones(3)}, checkpoint)
    command = [sys.executable, "-P", "-m", "rnp.untrusted.sandbox", json.dumps(asdict(Limits()))]
    environment = child_environment() | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with checkpoint.open("rb") as file:
        result = subprocess.run(
            command, stdin=file, capture_output=True, env=environment, check=True
        )
    report = json.loads(result.stderr)
    assert mark.exists() == (not hostile)
    if hostile:
        assert report["refused"].startswith("asks for 'commands.Popen'"), "its name in protocol 2"
