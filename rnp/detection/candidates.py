"""The images that sample detectors score, and what is known of the attack on them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rnp.detection.base import score_detection
from rnp.seeds import generator
from rnp.types import Bytes, ImageSet, Indices, PoisonedSet, Trigger

MIN_POISONED = 20
"""Poisoned training images among the candidates, where there are as many: an AUROC needs some."""


@dataclass(frozen=True)
class KnownAttack:
    """What is known of the attack. Detectors are scored with it, but do not receive it.

    `tests` are clean images and `triggered` those of other classes than the target, with the
    trigger on. `poisoned` are the changes to `pool`; `losses` the mean losses of the images in
    `pool` early in the training of the backdoored model, where they were recorded. `target` is
    None for an all-to-all attack.
    """

    target: int | None
    trigger: Trigger
    tests: ImageSet
    triggered: ImageSet
    pool: ImageSet
    poisoned: PoisonedSet
    losses: Float[Tensor, "m"] | None = None


@dataclass(frozen=True)
class Candidates:
    """Images to score, which of them carry a trigger, and which belong to the target class.

    `positions` are those of the images in the set that they were taken from.
    """

    images: Bytes
    triggered: Bool[Tensor, "n"]
    target_class: Bool[Tensor, "n"]
    positions: Indices

    def metrics(
        self, scores: Float[Tensor, "n"], clean_scores: Float[Tensor, "m"], needs_unlearned: bool
    ) -> dict[str, object]:
        """How well a detector's scores find the triggered images, and whether it unlearns."""
        quality = score_detection(scores, self.triggered, self.target_class, clean_scores)
        return {**dataclasses.asdict(quality), "needs_unlearned": needs_unlearned}


def select_candidates(
    attack: KnownAttack, num_test_images: int, num_training_images: int, seed: int
) -> dict[str, Candidates]:
    """The candidates of each task: `samples` for test images, `training_samples` for the others.

    There are no training images where `num_training_images` is 0 or the attack poisons none.
    """
    candidates = {
        "samples": from_test_images(attack.tests, attack.triggered, attack.target, num_test_images)
    }
    if num_training_images and (~attack.poisoned.covers).any():
        candidates["training_samples"] = from_training_images(
            attack.pool,
            attack.poisoned,
            attack.target,
            num_training_images,
            generator(seed, "training_samples"),
        )
    return candidates


def from_test_images(
    tests: ImageSet, triggered: ImageSet, target: int | None, n: int
) -> Candidates:
    """`n` clean and as many triggered test images.

    The triggered ones are taken from the end of their set, so that few of them repeat a clean one.
    """
    n = min(n, len(tests), len(triggered))
    first = torch.arange(n)
    last = torch.arange(len(triggered) - n, len(triggered))
    return _join(tests.subset(first), triggered.subset(last), target, torch.cat([first, last]))


def from_training_images(
    pool: ImageSet, changes: PoisonedSet, target: int | None, n: int, rng: torch.Generator
) -> Candidates:
    """`n` images of the poisoned training set at random.

    The share of poisoned ones is that of the set, but at least `MIN_POISONED` are taken. Covers
    are left out: they are neither clean nor poisoned. The target class is that of the labels in
    the poisoned set.
    """
    poisoned = (~changes.covers).nonzero().squeeze(1)
    untouched = torch.ones(len(pool), dtype=torch.bool)
    untouched[changes.positions] = False
    clean = untouched.nonzero().squeeze(1)
    total = len(clean) + len(poisoned)
    n = min(n, total)
    num_poisoned = min(len(poisoned), max(MIN_POISONED, round(n * len(poisoned) / total)))
    poisoned = _draw(poisoned, num_poisoned, rng)
    clean = _draw(clean, n - num_poisoned, rng)
    triggered = ImageSet(changes.images[poisoned], changes.labels[poisoned], pool.classes)
    positions = torch.cat([clean, changes.positions[poisoned]])
    return _join(pool.subset(clean), triggered, target, positions)


def _draw(positions: Indices, count: int, rng: torch.Generator) -> Indices:
    return positions[torch.randperm(len(positions), generator=rng)[:count]]


def _join(
    clean: ImageSet, triggered: ImageSet, target: int | None, positions: Indices
) -> Candidates:
    labels = torch.cat([clean.labels, triggered.labels])
    return Candidates(
        torch.cat([clean.images, triggered.images]),
        torch.arange(len(labels)) >= len(clean),
        labels == (-1 if target is None else target),
        positions,
    )
