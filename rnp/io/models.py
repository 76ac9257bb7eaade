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


def save_model(
    path: Path, model: Classifier, architecture: Architecture, classes: tuple[str, ...]
) -> None:
    layout = {"plain_because": model.plain_because} if model.plain_because else {}
    save_tensors(
        path,
        model.state_dict(),
        {"kind": "model", "classes": classes, **dataclasses.asdict(architecture), **layout},
    )


def load_model(path: Path) -> tuple[Classifier, Architecture, tuple[str, ...]]:
    """The model in eval mode on the default device, its architecture and class names.

    Raises: UserError when the file holds no model, or weights that do not fit the architecture
    that it names.
    """
    state, meta = load_tensors(path)
    if meta.get("kind") != "model":
        raise UserError(f"{path} holds {meta.get('kind')!r}, not a model")
    if not all(
        isinstance(meta.get(key), kind)
        for key, kind in (("arch", str), ("width", int), ("classes", list))
    ):
        raise UserError(f"{path} does not say of which architecture and classes it is")
    try:
        architecture = Architecture(arch=meta["arch"], width=meta["width"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    mean, std = (
        state.get("mean", torch.zeros(3)).flatten(),
        state.get("std", torch.ones(3)).flatten(),
    )
    model = architecture.build(len(meta["classes"]), len(mean), mean, std, rng=torch.Generator())
    load_state(model, state, f"{path} ({architecture.arch}, width {architecture.width})")
    if isinstance(reason := meta.get("plain_because"), str):
        model.lay_out(reason)
    return model.to(default_device()).eval(), architecture, tuple(meta["classes"])


def load_state(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Copy weights into `model`; every name and shape must fit.

    Raises: UserError naming the first one that does not.
    """
    own = model.state_dict()
    for name in sorted(own.keys() | state.keys()):
        if name not in state or name not in own:
            where = "lacks" if name in own else "has an unexpected"
            raise UserError(
                f"{what} {where} tensor {name!r}: the checkpoint is of another architecture"
            )
        if own[name].shape != state[name].shape:
            raise UserError(
                f"{what}: tensor {name!r} is {list(state[name].shape)}, the architecture needs"
                f" {list(own[name].shape)}"
            )
    model.load_state_dict(state)
