"""Shared types: images, defense sets, poisoned sets, triggers, neuron masks, history rows."""

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
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

Images = Float[Tensor, "n c h w"]
"""Images as the models see them: floats in [0, 1]. Normalization is the first layer of a model."""
Bytes = UInt8[Tensor, "n c h w"]
"""Images as they are stored."""
Labels = Int64[Tensor, "n"]
Logits = Float[Tensor, "n k"]
Indices = Int64[Tensor, "_"]
NeuronMask = dict[str, Float[Tensor, "_"]]
"""One value per channel of each maskable layer, by layer name; low = suspicious, 1 = unchanged."""

LARGE = 2**28  # bytes


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
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, positions: Indices) -> ImageSet:
        """The images at `positions`, in that order; a copy."""
        return ImageSet(take_images(self.images, positions), self.labels[positions], self.classes)

    def as_floats(self) -> Images:
        """All images as floats in [0, 1]; a copy."""
        return to_floats(self.images)


def take_images(images: UInt8[Tensor, "_ c h w"], positions: Indices) -> Bytes:
    """`images[positions]`, a copy."""
    copied = allocate_images(len(positions), *images.shape[1:])
    return torch.index_select(images, 0, positions, out=copied)


def allocate_images(*shape: int) -> Bytes:
    """Uninitialized images; large ones are backed by a temporary file, so memory stays bounded.

    The file is created in `TMPDIR`, else in /var/tmp, because /tmp is memory on many systems.

    Raises: OSError when the disk is full.
    """
    size = math.prod(shape)
    if size < LARGE:
        return torch.empty(shape, dtype=torch.uint8)
    folder = "/var/tmp" if "TMPDIR" not in os.environ and os.access("/var/tmp", os.W_OK) else None
    # the map outlives the file's name, so no file is left behind
    with tempfile.TemporaryFile(dir=folder) as backing:
        # without reserved blocks, a disk that fills up later kills the process
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(backing.fileno(), 0, size)
        return torch.from_numpy(np.memmap(backing, np.uint8, "w+", shape=shape))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a copy to a GPU is asynchronous."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def to_floats(images: UInt8[Tensor, "*batch c h w"]) -> Float[Tensor, "*batch c h w"]:
    """Bytes as floats in [0, 1]."""
    return images.float().div_(255)


def to_bytes(images: Images) -> Bytes:
    """Floats as bytes: clipped, rounded, then cast.

    Another order wraps bright pixels or darkens the image by half a step.
    """
    return images.clamp(0, 1).mul(255).round_().to(torch.uint8)


def backdoor_labels(labels: Labels, target: int | None, classes: int) -> Labels:
    """The labels that a backdoor assigns to images of the given ones.

    All become `target`; with None (all-to-all), each becomes the class after its own.
    """
    return (labels + 1) % classes if target is None else torch.full_like(labels, target)


@dataclass(frozen=True)
class DefenseSet:
    """The defender's clean images: `train` to optimize on, `val` to choose hyperparameters with.

    The attacker saw neither, unless the split took them from the training pool.
    """

    train: ImageSet
    val: ImageSet

    @property
    def all(self) -> ImageSet:
        """Both parts, `train` first; a copy."""
        images = allocate_images(len(self.train) + len(self.val), *self.train.shape)
        start = 0
        for part in (*self.train.images.split(1000), *self.val.images.split(1000)):
            images[start : start + len(part)] = part
            start += len(part)
        return ImageSet(images, torch.cat([self.train.labels, self.val.labels]), self.train.classes)


class Trigger(nn.Module, ABC):
    """A function from images to triggered images, each treated alone.

    All state is in buffers: it is saved with them and moves with them to a device.
    """

    @abstractmethod
    def forward(self, images: Images) -> Images: ...

    @property
    def support(self) -> Bool[Tensor, "h w"] | None:
        """The pixels that a patch covers; None for triggers that change the whole image."""
        return None


@dataclass(frozen=True)
class PoisonedSet:
    """The attacker's changes to a training set, and the trigger that made them.

    Image and label number i replace those at `positions[i]` of the clean set. `positions` ascend.
    `covers` marks the images that carry the trigger under their true label.
    """

    positions: Indices
    images: Bytes
    labels: Labels
    covers: Bool[Tensor, "n"]
    trigger: Trigger

    def apply(self, clean: ImageSet) -> ImageSet:
        """The poisoned training set: a copy of `clean` with the changes made."""
        images = allocate_images(*clean.images.shape).copy_(clean.images)
        labels = clean.labels.clone()
        images[self.positions] = self.images
        labels[self.positions] = self.labels
        return ImageSet(images, labels, clean.classes)


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One row of a training history.

    `loss` is the mean of the minimized objective over the epoch and `accuracy` that on its batches;
    `learning_rate` and `gradient_norm` are those of its last step.
    """

    epoch: int
    step: int
    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    extra: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, int | float]:
        """All values by column name, those of `extra` last."""
        values = dataclasses.asdict(self)
        return values | values.pop("extra")


OnEpoch = Callable[[Epoch], None]
"""Called after each epoch with its row of the history."""


def no_callback(_: Epoch) -> None:
    """The default `on_epoch`; does nothing."""
