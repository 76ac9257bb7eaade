"""Models as safetensors with their architecture and class names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from rnp.errors import UserError
from rnp.io.tensors import load_tensors, save_tensors
from rnp.models.build import Architecture
from rnp.models.classifier import Classifier
from rnp.training.device import default_device

OLD_LAYOUT_KEY = "plain_because"
"""The key of `contiguous_reason` in older files."""

COUNTER = ".num_batches_tracked"


def save_model(
    path: Path, model: nn.Module, architecture: Architecture, classes: tuple[str, ...]
) -> None:
    """Write the weights, with the architecture, the class names, and why they are contiguous."""
    meta = {"kind": "model", "classes": classes, **dataclasses.asdict(architecture)}
    if reason := getattr(model, "contiguous_reason", ""):
        meta["contiguous_reason"] = reason
    save_tensors(path, model.state_dict(), meta)


def load_model(path: Path | str) -> tuple[Classifier, Architecture, tuple[str, ...]]:
    """The model in eval mode on the default device, its architecture and class names.

    Raises: UserError when the file holds no model, or weights that do not fit the architecture
    that it names.
    """
    state, meta = load_tensors(Path(path))
    if meta.get("kind") != "model":
        raise UserError(f"{path} holds {meta.get('kind')!r}, not a model")
    kinds = {"arch": str, "width": int, "classes": list}
    if not all(isinstance(meta.get(key), kind) for key, kind in kinds.items()):
        raise UserError(f"{path} does not say of which architecture and classes it is")
    try:
        architecture = Architecture(arch=meta["arch"], width=meta["width"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    mean = state.get("mean", torch.zeros(3)).flatten()
    std = state.get("std", torch.ones(3)).flatten()
    model = architecture.build(len(meta["classes"]), len(mean), mean, std, rng=torch.Generator())
    load_state(model, state, f"{path} ({architecture.arch}, width {architecture.width})")
    reason = meta.get("contiguous_reason", meta.get(OLD_LAYOUT_KEY))
    if isinstance(reason, str):
        model.set_layout(reason)
    return model.to(default_device()).eval(), architecture, tuple(meta["classes"])


def load_state(model: torch.nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy weights into `model`; every name and shape must fit. `source` is for messages.

    Files of PyTorch before 0.4.1 do not count the batches of BatchNorm; the counters then stay.

    Raises: UserError naming the first one that does not.
    """
    expected = model.state_dict()
    if not any(name.endswith(COUNTER) for name in state):
        state = state | {name: v for name, v in expected.items() if name.endswith(COUNTER)}
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected:
            problem = "lacks" if name in expected else "has an unexpected"
            raise UserError(
                f"{source} {problem} tensor {name!r}: the checkpoint is of another architecture"
            )
        if expected[name].shape != state[name].shape:
            raise UserError(
                f"{source}: tensor {name!r} is {list(state[name].shape)}, the architecture needs"
                f" {list(expected[name].shape)}"
            )
    model.load_state_dict(state)
