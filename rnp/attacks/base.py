"""The base class of attacks, how they poison and test, and triggers that several of them use."""

from __future__ import annotations

import copy
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.registry import Method
from rnp.training.recipe import Train
from rnp.types import (
    Bytes,
    Images,
    ImageSet,
    Indices,
    Labels,
    OnEpoch,
    PoisonedSet,
    Trigger,
    allocate_images,
    backdoor_labels,
    no_callback,
    take_images,
    to_bytes,
    to_floats,
)

CHUNK_VALUES = 2**22
"""Pixel values that are held as floats at the same time: 16 MB."""
MAX_CLASS_FRACTION = 0.8
"""Share of the target class that a clean-label attack may poison; all of it costs accuracy."""

PoisonRate = Annotated[
    float, Interval(gt=0, le=1), "share of the whole training set that is poisoned"
]
CoverRate = Annotated[
    float,
    Interval(ge=0, le=1),
    "share of the training set that carries the trigger under its true label",
]


@dataclass(frozen=True, kw_only=True)
class Attack(Method, ABC):
    """A backdoor: it sends triggered images to the target label or, all-to-all, to the next class.

    An author writes `make_trigger` and, where needed, overrides `select_samples`, `poison_labels`,
    `apply_trigger`, `apply_cover` or `train`.
    """

    poison_rate: PoisonRate = 0.1
    cover_rate: CoverRate = 0.0
    target_label: Annotated[int, Ge(0), "class to which the trigger sends an image"] = 0
    label_mode: Annotated[
        Literal["all_to_one", "all_to_all"], "to the target label, or each class to the next one"
    ] = "all_to_one"

    min_asr = 0.9
    """The attack success rate from which on the backdoor counts as real."""
    threat_model = "the poisoned share of the training data, and their labels"
    """What the attacker controls."""
    clean_label = False
    """Whether poisoned images keep their labels: they are then images of the target class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clean_label and self.label_mode == "all_to_all":
            raise UserError(
                f"label_mode all_to_all changes labels, but {self.name} is clean-label; use"
                " all_to_one"
            )

    @property
    def target(self) -> int | None:
        """The class that triggered images are sent to; None where it depends on the image."""
        return self.target_label if self.label_mode == "all_to_one" else None

    @abstractmethod
    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Trigger:
        """The trigger for images like `clean`; everything random about it is drawn here."""

    def select_samples(self, labels: Labels, *, rng: torch.Generator) -> Indices:
        """Random positions to poison, ascending.

        Clean-label attacks take images of the target class, others of the other classes.
        """
        count = round(self.poison_rate * len(labels))
        if not self.clean_label:
            return sample_positions(not_target(labels, self.target), count, rng, "poison_rate")
        members = labels == self.target_label
        most = int(MAX_CLASS_FRACTION * members.sum())
        if count > most:
            raise UserError(
                f"poison_rate {self.poison_rate:g} asks for {count} images of class"
                f" {self.target_label}, which has {int(members.sum())}; a clean-label attack may"
                f" take 80 % of them, poison_rate {most / len(labels):.3g}"
            )
        return sample_positions(members, count, rng, "poison_rate")

    def poison_labels(self, labels: Labels, classes: int) -> Labels:
        """The labels that poisoned images get, from their true ones."""
        return backdoor_labels(labels, self.target, classes)

    def apply_trigger(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        """Training images with the trigger; override where it differs from the trigger at test."""
        return trigger(images)

    def apply_cover(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        """Cover images: with the trigger, or with another change that the model shall ignore."""
        return self.apply_trigger(trigger, images, rng=rng)

    def train(
        self,
        model: nn.Module,
        poisoned: ImageSet,
        trigger: Trigger,
        recipe: Train,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> tuple[nn.Module, Trigger]:
        """The backdoored model and the final trigger; attacks that steer training override this."""
        return recipe(model, poisoned, rng=rng, on_epoch=on_epoch), trigger

    def poison(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> PoisonedSet:
        """The changes to `clean`, which itself stays unchanged.

        Images are changed in chunks, so that memory stays bounded.

        Raises: UserError when the target label or the rates do not fit the data.
        """
        if self.target_label >= len(clean.classes):
            raise UserError(
                f"target_label must be below the number of classes, {len(clean.classes)},"
                f" got {self.target_label}"
            )
        trigger = self.make_trigger(clean, rng=rng, surrogate=surrogate)
        selected = self.select_samples(clean.labels, rng=rng)
        allowed = not_target(clean.labels, self.target)
        allowed[selected] = False
        covers = sample_positions(allowed, round(self.cover_rate * len(clean)), rng, "cover_rate")
        positions, order = torch.cat([selected, covers]).sort()
        is_cover = (torch.arange(len(positions)) >= len(selected))[order]
        images = take_images(clean.images, positions)
        for apply, rows in ((self.apply_trigger, ~is_cover), (self.apply_cover, is_cover)):
            for part in rows.nonzero().squeeze(1).split(chunk_size(images)):
                images[part] = to_bytes(apply(trigger, to_floats(images[part]), rng=rng))
        true_labels = clean.labels[positions]
        backdoored = self.poison_labels(true_labels, len(clean.classes))
        labels = torch.where(is_cover, true_labels, backdoored)
        return PoisonedSet(positions, images, labels, is_cover, trigger)


@torch.no_grad()
def trigger_images(trigger: Trigger, images: Bytes) -> Bytes:
    """The images with the trigger, rounded to bytes as a file holds them."""
    return map_images(trigger, images)


def map_images(change: Callable[[Images], Images], images: Bytes) -> Bytes:
    """The images changed in chunks, so that memory stays bounded."""
    # joining a list of parts would leave memory fragmented by the freed floats
    changed = allocate_images(*images.shape)
    size = chunk_size(images)
    for part, place in zip(images.split(size), changed.split(size)):
        place.copy_(to_bytes(change(to_floats(part))))
    return changed


def chunk_size(images: Bytes) -> int:
    """How many of the images to hold as floats at the same time."""
    return max(1, CHUNK_VALUES // max(1, images[:1].numel()))


def backdoored_test_set(trigger: Trigger, test: ImageSet, target: int | None) -> ImageSet:
    """Every test image of the other classes with the trigger, under its *true* label.

    All-to-all attacks have no target (None); their set holds all test images.
    """
    victims = other_classes(test, target)
    return ImageSet(trigger_images(trigger, victims.images), victims.labels, test.classes)


@torch.no_grad()
def covered_test_set(
    attack: Attack, trigger: Trigger, test: ImageSet, *, rng: torch.Generator
) -> ImageSet:
    """The images of `backdoored_test_set` as covers, under their true labels.

    A model with the intended backdoor still classifies them correctly. For `input_aware` that is
    the cross-trigger accuracy, for the noise mode of `wanet` the accuracy under other warps.
    """
    victims = other_classes(test, attack.target)
    cover = functools.partial(attack.apply_cover, trigger, rng=rng)
    return ImageSet(map_images(cover, victims.images), victims.labels, test.classes)


def other_classes(data: ImageSet, target: int | None) -> ImageSet:
    """The images of all classes but the target; all images where there is none."""
    return data.subset(not_target(data.labels, target).nonzero().squeeze(1))


def not_target(labels: Labels, target: int | None) -> Bool[Tensor, "n"]:
    """Which labels differ from the target; all of them where there is none."""
    return torch.ones_like(labels, dtype=torch.bool) if target is None else labels != target


def sample_positions(
    allowed: Bool[Tensor, "n"], count: int, rng: torch.Generator, option: str
) -> Indices:
    """`count` random positions among the `allowed` ones, ascending.

    Raises: UserError when fewer are allowed; it names the `option` to lower.
    """
    candidates = allowed.nonzero().squeeze(1)
    if count > len(candidates):
        raise UserError(
            f"{option} asks for {count} images, but only {len(candidates)} may be chosen; lower"
            f" {option}"
        )
    if count == 0 and option == "poison_rate":
        raise UserError(
            f"poison_rate is too small: it rounds to no image of {len(allowed)}; raise poison_rate"
        )
    return candidates[torch.randperm(len(candidates), generator=rng)[:count]].sort().values


class BlendTrigger(Trigger):
    """(1 - weight) * image + weight * pattern.

    `pattern` is [c, h, w], `weight` [1, h, w]; a patch has weight 1 on its pixels and 0 elsewhere.
    """

    pattern: Tensor
    weight: Tensor

    def __init__(self, pattern: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)
        self.register_buffer("weight", weight)

    def forward(self, images: Images) -> Images:
        return images + self.weight * (self.pattern - images)

    @property
    def support(self) -> Bool[Tensor, "h w"] | None:
        covered = self.weight[0] > 0
        return None if covered.all() else covered


class AdditiveTrigger(Trigger):
    """image + pattern, clipped to [0, 1]; `pattern` is [c, h, w]."""

    pattern: Tensor

    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)

    def forward(self, images: Images) -> Images:
        return (images + self.pattern).clamp(0, 1)


def noise(shape: tuple[int, int, int], *, rng: torch.Generator) -> Float[Tensor, "c h w"]:
    """A pattern of uniform noise."""
    return torch.rand(shape, generator=rng)


def waves(
    shape: tuple[int, int, int], *, rng: torch.Generator, count: int = 8
) -> Float[Tensor, "c h w"]:
    """A sum of `count` random cosines of low frequency per channel, stretched to [0, 1]."""
    channels, height, width = shape
    y = torch.arange(height).view(1, 1, -1, 1) / height
    x = torch.arange(width).view(1, 1, 1, -1) / width
    fy, fx = torch.randint(-4, 5, (2, channels, count, 1, 1), generator=rng).float()
    phase = torch.rand(channels, count, 1, 1, generator=rng)
    image = (2 * math.pi * (fy * y + fx * x + phase)).cos().sum(1)  # [c, h, w]
    low = image.amin((1, 2), keepdim=True)
    high = image.amax((1, 2), keepdim=True)
    return (image - low) / (high - low).clamp_min(1e-6)


def checkerboard(shape: tuple[int, int, int], size: int, margin: int = 0) -> BlendTrigger:
    """A black and white square in the lower right corner, `margin` pixels from the border.

    Raises: UserError when it does not fit.
    """
    channels, height, width = shape
    rows, columns = corner_square(height, width, size, margin)
    pattern = torch.zeros(channels, height, width)
    weight = torch.zeros(1, height, width)
    pattern[:, rows, columns] = checkered(size)
    weight[:, rows, columns] = 1
    return BlendTrigger(pattern, weight)


def corner_square(height: int, width: int, size: int, margin: int) -> tuple[slice, slice]:
    """Rows and columns of a square patch, `margin` pixels from the lower right corner.

    Raises: UserError when it does not fit.
    """
    reach = size + margin
    if not 1 <= size <= reach <= min(height, width):
        raise UserError(
            f"a patch of size {size} with margin {margin} does not fit {height}x{width} images"
        )
    return slice(height - reach, height - margin), slice(width - reach, width - margin)


def checkered(size: int) -> Float[Tensor, "size size"]:
    """Fields of 1 and 0 in turns, 1 in the corners of the main diagonal."""
    line = torch.arange(size)
    return ((line + line.unsqueeze(1)) % 2 == 0).float()


def trainable_copy(surrogate: nn.Module | None, attack: str) -> nn.Module:
    """A copy in training mode, every weight free.

    Raises: UserError when there is no surrogate.
    """
    return copy.deepcopy(require_surrogate(surrogate, attack)).requires_grad_().train()


def frozen_copy(surrogate: nn.Module | None, attack: str) -> nn.Module:
    """A copy in eval mode that needs no gradients.

    Raises: UserError when there is no surrogate.
    """
    return copy.deepcopy(require_surrogate(surrogate, attack)).requires_grad_(False).eval()


def require_surrogate(surrogate: nn.Module | None, attack: str) -> nn.Module:
    """`surrogate`, the benign model that some attacks need.

    Raises: UserError when it is None.
    """
    if surrogate is None:
        raise UserError(f"{attack} needs a benign model; pass surrogate=")
    return surrogate
