"""Tensors as safetensors; nothing here reads or writes a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.io.files import atomic_write, missing_file_error
from rnp.types import NeuronMask

META = "rnp"
"""The only metadata key: safetensors writes several in random order, and bytes must repeat."""


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: Mapping[str, object]) -> None:
    """safetensors with one JSON text as metadata: the same tensors give the same bytes."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as draft:
        save_file(flat, draft, metadata={META: json.dumps(meta, sort_keys=True)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata.

    Raises: UserError when the file is missing, damaged, or was not written by rnp.
    """
    if not path.is_file():
        raise missing_file_error(path)
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get(META, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no readable safetensors file ({error}); make it anew"
        ) from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} was not written by rnp: it does not say what it holds")
    return tensors, meta


def save_mask(path: Path, mask: NeuronMask) -> None:
    """Write a neuron mask and the order of its layers."""
    save_tensors(path, mask, {"kind": "mask", "layers": list(mask)})


def load_mask(path: Path) -> NeuronMask:
    """The mask, with its layers in the order in which they were saved.

    Raises: UserError when the file holds no mask.
    """
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "mask":
        raise UserError(f"{path} holds {meta.get('kind')!r}, not a neuron mask")
    layers = meta.get("layers")
    if not isinstance(layers, list) or set(map(str, layers)) != tensors.keys():
        raise UserError(f"{path} lacks layers of the mask, or holds others; make it anew")
    return {layer: tensors[layer] for layer in layers}


def mask_rows(mask: NeuronMask, model: nn.Module) -> list[dict[str, object]]:
    """One row per neuron, for people: layer, index, mask, and scale and bias of its channel.

    The scale of a convolution is the norm of the channel's kernel.
    """
    rows = []
    for layer, values in mask.items():
        scales, biases = channel_parameters(model.get_submodule(layer))
        columns = zip(values.tolist(), scales.tolist(), biases.tolist())
        for i, (value, scale, bias) in enumerate(columns):
            row = {"layer": layer, "index": i, "mask": f"{value:.6f}"}
            rows.append(row | {"scale": f"{scale:.6g}", "bias": f"{bias:.6g}"})
    return rows


def channel_parameters(module: nn.Module) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
    """Scale and bias of each channel of a maskable layer; no bias counts as 0."""
    weight = module.get_parameter("weight").detach()
    scales = weight if weight.dim() == 1 else weight.flatten(1).norm(dim=1)
    bias = getattr(module, "bias", None)
    return scales, torch.zeros_like(scales) if bias is None else bias.detach()
