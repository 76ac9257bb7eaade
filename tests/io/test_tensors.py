"""Masks keep order and precision; a mask file holds a mask."""

import pytest
import torch
from stored import refusal

from rnp.io.tensors import load_mask, mask_rows, save_mask, save_tensors


def test_masks_keep_order_and_precision(path):
    mask = {"z.bn": torch.tensor([1 - 2**-24, 1e-30]), "a.bn": torch.tensor([1 / 3])}
    save_mask(path, mask)
    loaded = load_mask(path)
    assert list(loaded) == ["z.bn", "a.bn"]
    assert all(torch.equal(loaded[layer], mask[layer]) for layer in mask)


def test_the_rows_of_a_norm_have_its_weight_and_bias(model):
    model.net.bn1.weight.data = torch.tensor([2.0, -3.0])
    model.net.bn1.bias.data = torch.tensor([0.5, 0.0])
    assert mask_rows({"net.bn1": torch.tensor([0.25, 1.0])}, model) == [
        {"layer": "net.bn1", "index": 0, "mask": "0.250000", "scale": "2", "bias": "0.5"},
        {"layer": "net.bn1", "index": 1, "mask": "1.000000", "scale": "-3", "bias": "0"},
    ]


def test_the_rows_of_a_convolution_have_the_norm_of_its_kernels(model):
    model.net.conv1.weight.data.fill_(1)
    (first, _) = mask_rows({"net.conv1": torch.tensor([0.0, 1.0])}, model)
    assert float(first["scale"]) == pytest.approx(27**0.5, rel=1e-5)
    assert first["bias"] == "0", "it has none"


def test_a_mask_must_hold_the_layers_that_it_names(folder):
    meta = {"kind": "mask", "layers": ["bn", "other"]}
    save_tensors(folder / "mask", {"bn": torch.ones(2)}, meta)
    assert "lacks layers of the mask, or holds others" in refusal(folder, "mask")
