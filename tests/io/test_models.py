"""Models are read back the same, byte for byte, and must fit the architecture that they name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stored import ARCHITECTURE, CLASSES, refusal

from rnp.io.models import load_model, save_model
from rnp.io.tensors import load_tensors, save_tensors
from rnp.training.predict import predict


def test_models(model, path, toy_set, monkeypatch):
    monkeypatch.setenv("RNP_DEVICE", "cpu")
    save_model(path, model.train(), ARCHITECTURE, CLASSES)
    loaded, architecture, classes = load_model(path)
    assert (architecture, classes, loaded.training) == (ARCHITECTURE, CLASSES, False)
    assert torch.equal(predict(loaded, toy_set(8).images), predict(model, toy_set(8).images))
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_model_keeps_its_memory_layout(model, path):
    save_model(path, model, ARCHITECTURE, CLASSES)
    assert load_model(path)[0].layout is torch.channels_last
    save_model(path, model.set_layout("of a reason"), ARCHITECTURE, CLASSES)
    loaded, _, _ = load_model(path)
    assert loaded.contiguous_reason == "of a reason"
    assert all(p.is_contiguous() for p in loaded.parameters())


@pytest.mark.parametrize("reason", ["of a reason", None])
def test_the_layout_of_older_files(reason, model, path):
    """They name the reason `plain_because`."""
    save_model(path, model, ARCHITECTURE, CLASSES)
    tensors, meta = load_tensors(path)
    assert "contiguous_reason" not in meta
    save_tensors(path, tensors, meta | {"plain_because": reason})
    assert load_model(path)[0].contiguous_reason == (reason or "")


PROGRAM = """
import sys, torch
from pathlib import Path
from rnp.io.models import save_model
from rnp.models.build import Architecture
arch = Architecture(arch="resnet10", width=2)
mean, std = torch.full((3,), 0.4), torch.full((3,), 0.2)
model = arch.build(4, 3, mean, std, rng=torch.Generator().manual_seed(0))
save_model(Path(sys.argv[1]), model, arch, ("a", "b", "c", "d"))
"""


def test_another_process_writes_the_same_bytes(model, path, tmp_path):
    save_model(path, model, ARCHITECTURE, CLASSES)
    other = tmp_path / "other.safetensors"
    subprocess.run(
        [sys.executable, "-c", PROGRAM, other],
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        cwd=Path(__file__).parents[2],
    )
    assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 3}, "tensor 'net.bn1.bias' is [2], the architecture needs [3]"),
        ({"arch": "preactresnet18"}, "of another architecture"),
        ({"arch": "resnet999"}, "unknown architecture 'resnet999'"),
        ({"classes": ["a"]}, "tensor 'net.fc.bias' is [4], the architecture needs [1]"),
        ({"classes": None}, "does not say"),
        ({"arch": None}, "does not say"),
        ({"width": "wide"}, "does not say"),
    ],
)
def test_a_model_must_fit_the_architecture_that_it_names(change, message, folder):
    tensors, meta = load_tensors(folder / "model")
    save_tensors(folder / "model", tensors, meta | change)
    assert message in refusal(folder, "model")


def test_a_missing_or_an_extra_tensor_is_named(folder):
    tensors, meta = load_tensors(folder / "model")
    bias = tensors.pop("net.fc.bias")
    save_tensors(folder / "model", tensors, meta)
    assert "lacks tensor 'net.fc.bias'" in refusal(folder, "model")
    save_tensors(folder / "model", tensors | {"net.fc.bias": bias, "extra": bias.clone()}, meta)
    assert "has an unexpected tensor 'extra'" in refusal(folder, "model")
