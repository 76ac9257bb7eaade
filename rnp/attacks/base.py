"""What an attack is: a trigger, a choice of samples, and the model that results. Also the triggers that several share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.registry import Method
from rnp.training import Train
from rnp.types import ImageSet, Images, Indices, Labels, OnEpoch, Trigger, ignore, to_bytes, to_floats

CHUNK = 1000


@dataclass(frozen=True)
class Poisoned:
    """What the attacker changes in a training set: `images[i]` and `labels[i]` replace position `positions[i]`.

    `positions` ascend; `covers` marks those that carry the trigger under their true label. Everything else is as before.
    """

    positions: Indices
    images: Tensor  # uint8 [m, c, h, w]
    labels: Tensor  # int64 [m]
    covers: Tensor  # bool [m]
    trigger: Trigger

    def apply(self, clean: ImageSet) -> ImageSet:
        """The poisoned training set: a copy of `clean` with the changes made."""
        images, labels = clean.images.clone(), clean.labels.clone()
        images[self.positions], labels[self.positions] = self.images, self.labels
        return ImageSet(images, labels, clean.classes)


@dataclass(frozen=True, kw_only=True)
class Attack(Method, ABC):
    """All-to-one backdoor. An author writes `make_trigger` and, where needed, `choose`, `relabel`, `stamp` or `train`."""

    poison_rate: Annotated[float, "share of the whole training set that is poisoned"] = 0.1
    cover_rate: Annotated[float, "share of the training set that carries the trigger under its true label"] = 0.0
    target_label: Annotated[int, "class to which the trigger sends an image"] = 0

    gate = 0.9
    """The least attack success rate at which the backdoor counts as real."""

    def __post_init__(self) -> None:
        for name, low in (("poison_rate", "("), ("cover_rate", "[")):
            value = getattr(self, name)
            if not (0 < value <= 1 or (value == 0 and low == "[")):
                hint = f"; did you mean {value / 100:.2f}?" if 1 < value <= 100 else ""
                raise UserError(f"{name} must be in {low}0, 1], got {value:g}{hint}")
        if self.target_label < 0:
            raise UserError(f"target_label must be 0 or more, got {self.target_label}")

    @abstractmethod
    def make_trigger(self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None) -> Trigger:
        """The trigger for images like `clean`; everything random about it is drawn here, from `rng`."""

    def choose(self, labels: Labels, *, rng: torch.Generator) -> Indices:
        """Positions to poison, ascending: random images of the other classes. Clean-label attacks choose differently."""
        return draw(labels != self.target_label, round(self.poison_rate * len(labels)), rng, "poison_rate")

    def relabel(self, labels: Tensor) -> Tensor:
        """The labels that poisoned images are given."""
        return torch.full_like(labels, self.target_label)

    def stamp(self, trigger: Trigger, images: Images, *, rng: torch.Generator) -> Images:
        """Training images with the trigger on, where it differs from the trigger at test time."""
        return trigger(images)

    def train(self, model: nn.Module, poisoned: ImageSet, trigger: Trigger, recipe: Train, *, rng: torch.Generator,
              on_epoch: OnEpoch = ignore) -> tuple[nn.Module, Trigger]:
        """The backdoored model and the final trigger; attacks that steer training override this."""
        return recipe(model, poisoned, rng=rng, on_epoch=on_epoch), trigger

    def poison(self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None) -> Poisoned:
        """The changes to `clean`, which stays as it is. Images are stamped in chunks, so that memory stays bounded.

        Raises: UserError when the target label or the rates do not fit the data.
        """
        if self.target_label >= len(clean.classes):
            raise UserError(f"target_label must be below the number of classes, {len(clean.classes)},"
                            f" got {self.target_label}")
        trigger = self.make_trigger(clean, rng=rng, surrogate=surrogate)
        chosen = self.choose(clean.labels, rng=rng)
        free = torch.ones(len(clean), dtype=torch.bool)
        free[chosen] = False
        covers = draw(free & (clean.labels != self.target_label), round(self.cover_rate * len(clean)), rng, "cover_rate")
        positions, order = torch.cat([chosen, covers]).sort()
        is_cover = (torch.arange(len(positions)) >= len(chosen))[order]
        labels = torch.where(is_cover, clean.labels[positions], self.relabel(clean.labels[positions]))
        images = [to_bytes(self.stamp(trigger, to_floats(clean.images[part]), rng=rng)) for part in positions.split(CHUNK)]
        return Poisoned(positions, torch.cat(images), labels, is_cover, trigger)


@torch.no_grad()
def trigger_images(trigger: Trigger, images: Tensor) -> Tensor:
    """uint8 images with the trigger on, rounded as a file would hold them."""
    return torch.cat([to_bytes(trigger(to_floats(part))) for part in images.split(CHUNK)])


def backdoored_test_set(trigger: Trigger, test: ImageSet, target_label: int) -> ImageSet:
    """Every test image of the other classes with the trigger on, under its *true* label."""
    others = test.subset((test.labels != target_label).nonzero().squeeze(1))
    return ImageSet(trigger_images(trigger, others.images), others.labels, test.classes)


def draw(allowed: Tensor, count: int, rng: torch.Generator, rate: str) -> Indices:
    """`count` random positions among those that are `allowed`, ascending.

    Raises: UserError when fewer are allowed; `rate` names the option to lower.
    """
    candidates = allowed.nonzero().squeeze(1)
    if count > len(candidates):
        raise UserError(f"{rate} asks for {count} images, but only {len(candidates)} may be chosen; lower {rate}")
    if count == 0 and rate == "poison_rate":
        raise UserError(f"poison_rate is too small: it rounds to no image of {len(allowed)}; raise poison_rate")
    return candidates[torch.randperm(len(candidates), generator=rng)[:count]].sort().values


class Mix(Trigger):
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


class Add(Trigger):
    """image + pattern, clipped to [0, 1]; `pattern` is [c, h, w]."""

    def __init__(self, pattern: Tensor) -> None:
        super().__init__()
        self.register_buffer("pattern", pattern)

    def forward(self, images: Images) -> Images:
        return (images + self.pattern).clamp(0, 1)
