"""Tensors as safetensors; nothing here reads or writes a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rnp.errors import UserError
from rnp.io.files import atomic_write, missing_file_error
from rnp.types import NeuronMask

# the one metadata key: safetensors writes several in random order, and files must repeat byte for
# byte
META = "rnp"


def save_tensors(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """safetensors with one JSON text as metadata: the same tensors give the same bytes."""
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as draft:
        save_file(flat, draft, metadata={META: json.dumps(meta, sort_keys=True)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata.

    Raises: UserError when the file is missing, damaged, or none of ours.
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
    save_tensors(path, mask, {"kind": "mask", "layers": list(mask)})


def load_mask(path: Path) -> NeuronMask:
    """The mask with its layers in the order in which they were saved, at full precision."""
    tensors, meta = load_tensors(path)
    if meta.get("kind") != "mask":
        raise UserError(f"{path} holds {meta.get('kind')!r}, not a neuron mask")
    layers = meta.get("layers")
    if not isinstance(layers, list) or set(map(str, layers)) != tensors.keys():
        raise UserError(f"{path} lacks layers of the mask, or holds others; make it anew")
    return {layer: tensors[layer] for layer in layers}


def mask_rows(mask: NeuronMask, model: torch.nn.Module) -> list[dict]:
    """One row per neuron, for people: layer, index, mask, and the scale (of a kernel the norm) and
    bias of its channel.
    """
    rows = []
    for layer, values in mask.items():
        module = model.get_submodule(layer)
        scales = (
            module.weight.detach()
            if module.weight.dim() == 1
            else module.weight.detach().flatten(1).norm(dim=1)
        )
        biases = getattr(module, "bias", None)
        biases = torch.zeros_like(scales) if biases is None else biases
        rows += [
            {
                "layer": layer,
                "index": i,
                "mask": f"{m:.6f}",
                "scale": f"{s:.6g}",
                "bias": f"{b:.6g}",
            }
            for i, (m, s, b) in enumerate(zip(values.tolist(), scales.tolist(), biases.tolist()))
        ]
    return rows
