"""What an attack is: a trigger, a choice of samples, and the model that results. Also the triggers
that several share.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.registry import Method
from rnp.training.recipe import Train
from rnp.types import (
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

AT_ONCE = 2**22  # values that are floats at the same time: 16 MB


# of the target class; poisoning all of it leaves no clean image of the class and costs accuracy
LARGEST_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Attack(Method, ABC):
    """A backdoor: images with the trigger go to the target label, or, all-to-all, each to the
    class after its own.

    An author writes `make_trigger` and, where needed, `choose`, `relabel`, `stamp`, `stamp_cover`
    or `train`.
    """

    poison_rate: Annotated[
        float, Interval(gt=0, le=1), "share of the whole training set that is poisoned"
    ] = 0.1
    cover_rate: Annotated[
        float,
        Interval(ge=0, le=1),
        "share of the training set that carries the trigger under its true label",
    ] = 0.0
    target_label: Annotated[int, Ge(0), "class to which the trigger sends an image"] = 0
    label_mode: Annotated[
        Literal["all_to_one", "all_to_all"], "to the target label, or each class to the next one"
    ] = "all_to_one"

    min_asr = 0.9
    """The least attack success rate at which the backdoor counts as real."""
    threat_model = "the poisoned share of the training data, and their labels"
    """What the attacker needs to have in hand."""
    clean_label = False
    """Whether poisoned images keep their labels: they are then images of the target class."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clean_label and self.label_mode == "all_to_all":
            raise UserError(
                f"label_mode all_to_all needs changed labels, and {self.name} changes none; use"
                " all_to_one"
            )

    @property
    def target(self) -> int | None:
        """The class that the backdoor leads to; None where it depends on the image."""
        return self.target_label if self.label_mode == "all_to_one" else None

    @abstractmethod
    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Trigger:
        """The trigger for images like `clean`; everything random about it is drawn here, from
        `rng`.
        """

    def select_samples(self, labels: Labels, *, rng: torch.Generator) -> Indices:
        """Positions to poison, ascending: random images, of the target class for clean-label
        attacks, else of the others.
        """
        wanted = round(self.poison_rate * len(labels))
        if not self.clean_label:
            return sample_positions(not_target(labels, self.target), wanted, rng, "poison_rate")
        members = labels == self.target_label
        if wanted > (most := int(LARGEST_SHARE * members.sum())):
            raise UserError(
                f"poison_rate {self.poison_rate:g} asks for {wanted} images of class"
                f" {self.target_label}, which has {int(members.sum())}; a clean-label attack may"
                f" take 80 % of them, poison_rate {most / len(labels):.3g}"
            )
        return sample_positions(members, wanted, rng, "poison_rate")

    def poison_labels(self, labels: Tensor, classes: int) -> Tensor:
        """The labels that poisoned images of the given ones get."""
        return backdoor_labels(labels, self.target, classes)

    def apply_trigger(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        """Training images with the trigger on, where it differs from the trigger at test time."""
        return trigger(images)

    def apply_cover(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        """Cover images with the trigger on, or with what else the model shall learn to ignore."""
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
        """The changes to `clean`, which stays as it is. Images are stamped in chunks, so that
        memory stays bounded.

        Raises: UserError when the target label or the rates do not fit the data.
        """
        if self.target_label >= len(clean.classes):
            raise UserError(
                f"target_label must be below the number of classes, {len(clean.classes)},"
                f" got {self.target_label}"
            )
        trigger = self.make_trigger(clean, rng=rng, surrogate=surrogate)
        chosen = self.select_samples(clean.labels, rng=rng)
        free = not_target(clean.labels, self.target)
        free[chosen] = False
        covers = sample_positions(free, round(self.cover_rate * len(clean)), rng, "cover_rate")
        positions, order = torch.cat([chosen, covers]).sort()
        is_cover = (torch.arange(len(positions)) >= len(chosen))[order]
        before = clean.labels[positions]
        images = take_images(clean.images, positions)
        for stamp, rows in ((self.apply_trigger, ~is_cover), (self.apply_cover, is_cover)):
            for part in rows.nonzero().squeeze(1).split(chunk(images)):
                images[part] = to_bytes(stamp(trigger, to_floats(images[part]), rng=rng))
        return PoisonedSet(
            positions,
            images,
            torch.where(is_cover, before, self.poison_labels(before, len(clean.classes))),
            is_cover,
            trigger,
        )


@torch.no_grad()
def trigger_images(trigger: Trigger, images: Tensor) -> Tensor:
    """uint8 images with the trigger on, rounded as a file would hold them."""
    written = allocate_images(
        *images.shape
    )  # a list of parts among freed floats would leave memory full of holes
    for part, into in zip(images.split(chunk(images)), written.split(chunk(images))):
        into.copy_(to_bytes(trigger(to_floats(part))))
    return written


def chunk(images: Tensor) -> int:
    """How many images to treat at once."""
    return max(1, AT_ONCE // max(1, images[:1].numel()))


def backdoored_test_set(trigger: Trigger, test: ImageSet, target: int | None) -> ImageSet:
    """Every test image of the other classes with the trigger on, under its *true* label;
    all-to-all has no target.
    """
    victims = test.subset(not_target(test.labels, target).nonzero().squeeze(1))
    return ImageSet(trigger_images(trigger, victims.images), victims.labels, test.classes)


@torch.no_grad()
def covered_test_set(
    attack: Attack, trigger: Trigger, test: ImageSet, *, rng: torch.Generator
) -> ImageSet:
    """The same images as covers, under their true labels: a model with the backdoor as it is meant
    still classifies them.

    For `input_aware` that is the cross-trigger accuracy, for the noise mode of `wanet` that under
    other warps.
    """
    victims = test.subset(not_target(test.labels, attack.target).nonzero().squeeze(1))
    images = allocate_images(*victims.images.shape)
    for part, into in zip(victims.images.split(chunk(images)), images.split(chunk(images))):
        into.copy_(to_bytes(attack.apply_cover(trigger, to_floats(part), rng=rng)))
    return ImageSet(images, victims.labels, test.classes)


def not_target(labels: Tensor, target: int | None) -> Tensor:
    """Which labels differ from the target; all of them where there is none."""
    return torch.ones_like(labels, dtype=torch.bool) if target is None else labels != target


def sample_positions(allowed: Tensor, count: int, rng: torch.Generator, rate: str) -> Indices:
    """`count` random positions among those that are `allowed`, ascending.

    Raises: UserError when fewer are allowed; `rate` names the option to lower.
    """
    candidates = allowed.nonzero().squeeze(1)
    if count > len(candidates):
        raise UserError(
            f"{rate} asks for {count} images, but only {len(candidates)} may be chosen; lower"
            f" {rate}"
        )
    if count == 0 and rate == "poison_rate":
        raise UserError(
            f"poison_rate is too small: it rounds to no image of {len(allowed)}; raise poison_rate"
        )
    return candidates[torch.randperm(len(candidates), generator=rng)[:count]].sort().values


class BlendTrigger(Trigger):
    """(1 - weight) * image + weight * pattern. A patch has weight 1 on its pixels and 0 elsewhere.

    `pattern` is [c, h, w]; `weight` is [1, h, w].
    """

    def __init__(self, pattern: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)
        self.register_buffer("weight", weight)

    def forward(self, images: Images) -> Images:
        return images + self.weight * (self.pattern - images)

    @property
    def support(self) -> Tensor | None:
        covered = self.weight[0] > 0
        return None if covered.all() else covered


class AdditiveTrigger(Trigger):
    """image + pattern, clipped to [0, 1]; `pattern` is [c, h, w]."""

    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)

    def forward(self, images: Images) -> Images:
        return (images + self.pattern).clamp(0, 1)


def noise(shape: tuple[int, int, int], *, rng: torch.Generator) -> Tensor:
    """A pattern of uniform noise."""
    return torch.rand(shape, generator=rng)


def waves(shape: tuple[int, int, int], *, rng: torch.Generator, count: int = 8) -> Tensor:
    """A sum of `count` random cosines of low frequency per channel, stretched to [0, 1]."""
    channels, height, width = shape
    y = torch.arange(height).view(1, 1, -1, 1) / height
    x = torch.arange(width).view(1, 1, 1, -1) / width
    fy, fx = (torch.randint(-4, 5, (2, channels, count, 1, 1), generator=rng)).float()
    phase = torch.rand(channels, count, 1, 1, generator=rng)
    image = (2 * math.pi * (fy * y + fx * x + phase)).cos().sum(1)  # [c, h, w]
    low, high = image.amin((1, 2), keepdim=True), image.amax((1, 2), keepdim=True)
    return (image - low) / (high - low).clamp_min(1e-6)


def checkerboard(shape: tuple[int, int, int], size: int, margin: int = 0) -> BlendTrigger:
    """A black and white square in the lower right corner, `margin` pixels from the border, the
    same in all channels.

    Raises: UserError when it does not fit.
    """
    channels, height, width = shape
    reach = size + margin
    if not 1 <= size <= reach <= min(height, width):
        raise UserError(
            f"a patch of size {size} with margin {margin} does not fit {height}x{width} images"
        )
    pattern, weight = torch.zeros(channels, height, width), torch.zeros(1, height, width)
    square = (..., slice(height - reach, height - margin), slice(width - reach, width - margin))
    line = torch.arange(size)
    pattern[square] = ((line + line.unsqueeze(1)) % 2 == 0).float()
    weight[square] = 1
    return BlendTrigger(pattern, weight)


def trainable_copy(surrogate: nn.Module | None, attack: str) -> nn.Module:
    """A copy in training mode, every weight free.

    Raises: UserError when there is none to copy.
    """
    if surrogate is None:
        raise UserError(f"{attack} trains its generator against a benign model; pass surrogate=")
    return copy.deepcopy(surrogate).requires_grad_().train()
