"""The nouns of the project: images, defense sets, triggers, neuron masks, and one row of a
training history.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

Images = Float[Tensor, "n c h w"]
"""Images as the models see them: floats in [0, 1]. Normalization is the first layer of a model."""
Bytes = UInt8[Tensor, "n c h w"]
"""Images as they are stored."""
Labels = Int64[Tensor, "n"]
Logits = Float[Tensor, "n k"]
Indices = Int64[Tensor, "_"]
NeuronMask = dict[str, Float[Tensor, "_"]]
"""One value per channel for each maskable layer, by layer name; low = suspicious, 1 = untouched."""


@dataclass(frozen=True)
class ImageSet:
    """Labeled images in memory or behind a memory map; never changed in place."""

    images: Bytes
    labels: Labels
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return tuple(self.images.shape[1:])

    def subset(self, positions: Indices) -> ImageSet:
        return ImageSet(take_images(self.images, positions), self.labels[positions], self.classes)

    def as_floats(self) -> Images:
        """All images as floats in [0, 1]; a copy."""
        return to_floats(self.images)


LARGE = 2**28  # bytes


def take_images(images: UInt8[Tensor, "_ c h w"], positions: Indices) -> Bytes:
    """`images[positions]`, a copy."""
    return torch.index_select(
        images, 0, positions, out=allocate_images(len(positions), *images.shape[1:])
    )


def allocate_images(*shape: int) -> Bytes:
    """Images to be written; large ones lie behind a temporary file, so that memory stays bounded.

    The file is where `TMPDIR` says, else in /var/tmp: on many systems /tmp is memory.

    Raises: OSError when the disk is full.
    """
    size = math.prod(shape)
    if size < LARGE:
        return torch.empty(shape, dtype=torch.uint8)
    folder = "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else None
    with tempfile.TemporaryFile(
        dir=folder
    ) as backing:  # the map outlives the name, and nothing is left behind
        if size and hasattr(
            os, "posix_fallocate"
        ):  # else a disk that fills up while the map is written kills the process
            os.posix_fallocate(backing.fileno(), 0, size)
        return torch.from_numpy(np.memmap(backing, np.uint8, "w+", shape=shape))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; Python does not wait until a GPU has it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_floats(images: UInt8[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c h w"]:
    return images.float().div_(255)


def to_bytes(images: Images) -> Bytes:
    """Clip, round, then cast: the other orders wrap bright pixels or bias the image by half a
    step.
    """
    return images.clamp(0, 1).mul(255).round_().to(torch.uint8)


def backdoor_labels(labels: Labels, target: int | None, classes: int) -> Labels:
    """Where a backdoor sends images of the given labels: to `target`, or, all-to-all (None), to
    the class after their own.
    """
    return (labels + 1) % classes if target is None else torch.full_like(labels, target)


@dataclass(frozen=True)
class DefenseSet:
    """The defender's clean images: `train` to optimize on, `val` to choose with; neither was seen
    by the attacker.
    """

    train: ImageSet
    val: ImageSet

    @property
    def all(self) -> ImageSet:
        """For a model that was trained on neither; a copy, behind a file when it is large."""
        images, start = allocate_images(len(self.train) + len(self.val), *self.train.shape), 0
        for part in (*self.train.images.split(1000), *self.val.images.split(1000)):
            images[start : start + len(part)] = part
            start += len(part)
        return ImageSet(images, torch.cat([self.train.labels, self.val.labels]), self.train.classes)


class Trigger(nn.Module, ABC):
    """Images -> images, each treated alone. All state lives in buffers, so that it can be saved
    and shared.
    """

    @abstractmethod
    def forward(self, images: Images) -> Images: ...

    @property
    def support(self) -> Tensor | None:
        """[h, w] boolean: the pixels that a patch covers; None for triggers that touch the whole
        image.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One row of a training history. `loss` is the objective that was minimized, `accuracy` that
    of the seen batches.
    """

    epoch: int
    step: int
    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    extra: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, int | float]:
        values = dataclasses.asdict(self)
        return values | values.pop("extra")


OnEpoch = Callable[[Epoch], None]


def no_callback(_: Epoch) -> None:
    """The listener for callers who do not listen."""


@dataclass(frozen=True)
class PoisonedSet:
    """What the attacker changes in a training set: `images[i]` and `labels[i]` replace position
    `positions[i]`.

    `positions` ascend; `covers` marks those that carry the trigger under their true label.
    Everything else is as before.
    """

    positions: Indices
    images: Tensor  # uint8 [m, c, h, w]
    labels: Tensor  # int64 [m]
    covers: Tensor  # bool [m]
    trigger: Trigger

    def apply(self, clean: ImageSet) -> ImageSet:
        """The poisoned training set: a copy of `clean` with the changes made."""
        images, labels = (
            allocate_images(*clean.images.shape).copy_(clean.images),
            clean.labels.clone(),
        )
        images[self.positions], labels[self.positions] = self.images, self.labels
        return ImageSet(images, labels, clean.classes)
