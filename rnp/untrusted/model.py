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
from rnp.models.classifier import Classifier, are_probabilities, choose_layout
from rnp.models.names import TIMM, TORCHVISION
from rnp.training.device import default_device
from rnp.training.predict import predict
from rnp.untrusted.convert import Converted, convert

State = dict[str, Tensor]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""What most networks of torchvision and timm were trained with."""
PROBE_CLASSES = 3


@dataclass(frozen=True)
class LoadedModel:
    """A classifier of unknown origin, in eval mode on the default device.

    `classes` are the names that the file states, if any. With `has_normalization` the names in
    the file are those of `model`, else those of `model.net`.
    """

    model: Classifier
    architecture: Architecture
    classes: tuple[str, ...]
    has_normalization: bool
    converted: Converted

    def named(self, model: Classifier) -> State:
        """The weights of a repaired copy, under the names that the file had."""
        return model.state_dict() if self.has_normalization else model.net.state_dict()


def load_untrusted_model(
    path: Path,
    *,
    arch: str = "",
    width: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> LoadedModel:
    """Read the weights in `path` by `convert`; every name, shape and dtype must fit `arch`.

    A file that `rnp` wrote states its architecture and normalization itself.

    Raises: UserError when the file is refused, when it does not fit, or when the architecture or
    the normalization is not stated.
    """
    with tempfile.TemporaryDirectory() as folder:
        safetensors = Path(folder) / "weights.safetensors"
        converted = convert(path, safetensors)
        state, _ = load_tensors(safetensors)
    metadata = read_metadata(path)
    architecture = choose_architecture(path, arch, width, metadata)
    has_normalization = is_classifier_state(state)
    if has_normalization:
        channel_mean, channel_std = state["mean"].flatten(), state["std"].flatten()
        names = state.keys() - {"mean", "std"}
        state = {name.removeprefix("net."): state[name] for name in sorted(names)}
    else:
        channel_mean, channel_std = choose_normalization(architecture, mean, std)
    require_normalization(channel_mean, channel_std)

    def build(classes: int) -> Classifier:
        channels = len(channel_mean)
        rng = torch.Generator()
        return architecture.build(classes, channels, channel_mean, channel_std, rng=rng)

    model = build(infer_num_classes(build, state, str(path)))
    require_same_dtypes(model.net.state_dict(), state, path)
    load_state(model.net, state, f"{path} ({architecture.arch})")
    stated = metadata.get("classes")
    classes = tuple(map(str, stated)) if isinstance(stated, list) else ()
    model = model.to(default_device()).eval()
    return LoadedModel(model, architecture, classes, has_normalization, converted)


def read_metadata(path: Path) -> dict:
    """What a file of rnp states about itself: text, which is checked like anything typed."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(META, "{}"))
    except (SafetensorError, OSError, ValueError):
        return {}
    is_model = isinstance(metadata, dict) and metadata.get("kind") == "model"
    return metadata if is_model else {}


def choose_architecture(path: Path, arch: str, width: int, metadata: dict) -> Architecture:
    """The architecture that the user names, else that of the file's metadata.

    Raises: UserError when there is neither.
    """
    register_function(arch)
    if arch:
        return Architecture(arch=arch, width=width)
    if not isinstance(metadata.get("arch"), str):
        raise UserError(
            f"{path} does not say of which architecture it is; name it, as in --arch resnet18"
        )
    return Architecture(arch=metadata["arch"], width=width or int(metadata.get("width", 0)))


def is_classifier_state(state: State) -> bool:
    """Whether these are the weights of a whole `Classifier`, not those of its `net` alone."""
    names = state.keys() - {"mean", "std"}
    return {"mean", "std"} < state.keys() and all(name.startswith("net.") for name in names)


def choose_normalization(
    architecture: Architecture, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel: those given, else those usual for the architecture.

    Raises: UserError when there are neither.
    """
    if mean and std:
        return torch.tensor(mean), torch.tensor(std)
    if architecture.arch.startswith((TORCHVISION, TIMM)):
        return torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    raise UserError(
        "say how the model's inputs, in [0, 1], are normalized: --mean .5,.5,.5 --std"
        " .25,.25,.25, or --mean 0,0,0 --std 1,1,1 where they are not"
    )


def require_normalization(mean: Tensor, std: Tensor) -> None:
    """Raises: UserError unless each channel has a mean and a positive standard deviation."""
    if len(mean) != len(std) or not (std > 0).all():
        raise UserError(
            f"--mean and --std need a number per channel, those of --std above 0; got {len(mean)}"
            f" and {len(std)}"
        )


def require_same_dtypes(expected: State, state: State, path: Path) -> None:
    """Raises: UserError at the first tensor of another dtype than the architecture's."""
    for name in expected:
        if name in state and expected[name].dtype != state[name].dtype:
            raise UserError(
                f"{path}: tensor {name!r} is {state[name].dtype}, the architecture needs"
                f" {expected[name].dtype}; convert the weights"
            )


def infer_num_classes(build: Callable[[int], Classifier], state: State, source: str) -> int:
    """The number of classes: the first side of the tensors that depend on it.

    They are found by comparing `state` with a network of `PROBE_CLASSES` classes.

    Raises: UserError when they do not agree on one.
    """
    probe = build(PROBE_CLASSES).net.state_dict()
    sizes = {
        len(state[name])
        for name, value in probe.items()
        if name in state
        and value.dim()
        and len(value) == PROBE_CLASSES
        and state[name].shape[1:] == value.shape[1:]
        and len(state[name]) != PROBE_CLASSES
    }
    if len(sizes) > 1:
        raise UserError(
            f"{source} has heads of {', '.join(map(str, sorted(sizes)))} classes; rnp repairs"
            " classifiers with one head"
        )
    return sizes.pop() if sizes else PROBE_CLASSES


def output_size(model: Classifier, image_size: int) -> int:
    """The number of outputs for square images.

    On the way it chooses the memory layout, and notes whether the network ends in a softmax.

    Raises: UserError as `choose_layout` does.
    """
    images = torch.zeros(2, len(model.mean.flatten()), image_size, image_size)
    outputs = predict(choose_layout(model, images.to(model.mean.device)), images)
    model.gives_probabilities = are_probabilities(outputs)
    return outputs.shape[1]
