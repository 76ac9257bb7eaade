"""An untrusted checkpoint as a model that every other part of rnp works with."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rnp.errors import UserError
from rnp.io.models import load_state
from rnp.io.tensors import META, load_tensors
from rnp.models.build import Architecture, register_function
from rnp.models.classifier import Classifier, choose_layout
from rnp.models.names import TIMM, TORCHVISION
from rnp.training.device import default_device
from rnp.training.predict import predict
from rnp.untrusted.convert import Converted, convert

IMAGENET = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # what torchvision's and timm's networks are mostly fed with


@dataclass(frozen=True)
class LoadedModel:
    """A stranger's classifier. `whole` says that the file's names are those of `model`; else they
    are those of `model.net`.
    """

    model: Classifier
    architecture: Architecture
    classes: tuple[str, ...]  # that the file names; empty when it names none
    has_normalization: bool
    converted: Converted

    def named(self, model: Classifier) -> dict[str, Tensor]:
        """The weights of a repaired copy, under the names that the stranger's own code knows."""
        return model.state_dict() if self.has_normalization else model.net.state_dict()


def load_untrusted_model(
    path: Path,
    *,
    arch: str = "",
    width: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> LoadedModel:
    """Read the weights in `path` through the quarantine; every name, shape and dtype must be the
    architecture's.

    A file that `rnp` wrote says itself of which architecture and normalization it is.

    Raises: UserError when the file is refused, when it does not fit, or when something has to be
    said.
    """
    with tempfile.TemporaryDirectory() as folder:
        converted = convert(path, Path(folder) / "weights.safetensors")
        state, _ = load_tensors(Path(folder) / "weights.safetensors")
    said = read_metadata(path)
    register_function(arch)
    if not arch and not isinstance(said.get("arch"), str):
        raise UserError(
            f"{path} does not say of which architecture it is; name it, as in --arch resnet18"
        )
    architecture = Architecture(
        arch=arch or said["arch"], width=width or (0 if arch else int(said.get("width", 0)))
    )
    whole = {"mean", "std"} < state.keys() and all(
        name.startswith("net.") for name in state.keys() - {"mean", "std"}
    )
    if whole:
        mean, std = state["mean"].flatten(), state["std"].flatten()
    elif mean and std:
        mean, std = torch.tensor(mean), torch.tensor(std)
    elif architecture.arch.startswith((TORCHVISION, TIMM)):
        mean, std = map(torch.tensor, IMAGENET)
    else:
        raise UserError(
            "say how the model's inputs, in [0, 1], are normalized: --mean .5,.5,.5 --std"
            " .25,.25,.25, or --mean 0,0,0 --std 1,1,1 where they are not"
        )
    if len(mean) != len(std) or not (std > 0).all():
        raise UserError(
            f"--mean and --std need a number per channel, those of --std above 0; got {len(mean)}"
            f" and {len(std)}"
        )
    net = {
        name.removeprefix("net."): value
        for name, value in state.items()
        if not (whole and name in ("mean", "std"))
    }

    def build(k):
        return architecture.build(k, len(mean), mean, std, rng=torch.Generator())

    model = build(infer_num_classes(build, net, str(path)))
    own = model.net.state_dict()
    odd = next(
        (name for name in own.keys() & net.keys() if own[name].dtype != net[name].dtype), None
    )
    if odd:
        raise UserError(
            f"{path}: tensor {odd!r} is {net[odd].dtype}, the architecture needs {own[odd].dtype};"
            " convert the weights"
        )
    load_state(model.net, net, f"{path} ({architecture.arch})")
    classes = tuple(map(str, said["classes"])) if isinstance(said.get("classes"), list) else ()
    return LoadedModel(model.to(default_device()).eval(), architecture, classes, whole, converted)


def read_metadata(path: Path) -> dict:
    """What a file that rnp wrote says of itself: text, which is checked like anything that is
    typed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            said = json.loads((file.metadata() or {}).get(META, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    return said if isinstance(said, dict) and said.get("kind") == "model" else {}


def infer_num_classes(
    build: Callable[[int], Classifier], state: dict[str, Tensor], what: str
) -> int:
    """The number of classes: the first side of the tensors by which a network of three classes
    differs from `state`.

    Raises: UserError when they do not agree on one.
    """
    probe = build(3).net.state_dict()
    sizes = {
        len(state[name])
        for name, value in probe.items()
        if name in state
        and value.dim()
        and len(value) == 3
        and state[name].shape[1:] == value.shape[1:]
        and len(state[name]) != 3
    }
    if len(sizes) > 1:
        raise UserError(
            f"{what} has heads of {', '.join(map(str, sorted(sizes)))} classes; rnp repairs"
            " classifiers with one head"
        )
    return sizes.pop() if sizes else 3


def output_size(model: Classifier, side: int) -> int:
    """The number of outputs for images of that side; with two of them the network is looked at and
    laid out.

    Raises: UserError as `choose_layout` does.
    """
    images = torch.zeros(2, len(model.mean.flatten()), side, side)
    return predict(choose_layout(model, images.to(model.mean.device)), images).shape[1]
