"""Images among which sample detectors look for triggered ones."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from rnp.detection.base import score_detection
from rnp.types import Bytes, ImageSet, Indices, PoisonedSet

MIN_POISONED = 20
"""Poisoned training images to look for, where there are as many: of fewer an AUROC says little."""


@dataclass(frozen=True)
class Candidates:
    """Images to judge, which of them carry a trigger, which belong to the target class, and where
    they lie in their set.
    """

    images: Bytes
    positives: Tensor  # bool [n]
    targets: Tensor  # bool [n]
    places: Indices

    def score_detection(
        self, scores: Tensor, own: Tensor, asks_unlearned: bool
    ) -> dict[str, object]:
        return dataclasses.asdict(score_detection(scores, self.positives, self.targets, own)) | {
            "asks_unlearned": asks_unlearned
        }


def from_test_images(tests: ImageSet, attacked: ImageSet, target: int | None, n: int) -> Candidates:
    """`n` clean and as many triggered test images.

    The triggered ones are taken from the end of their set, so that few of them repeat a clean one.
    """
    n = min(n, len(tests), len(attacked))
    good, bad = torch.arange(n), torch.arange(len(attacked) - n, len(attacked))
    return _join(tests.subset(good), attacked.subset(bad), target, torch.cat([good, bad]))


def from_training_images(
    pool: ImageSet, changes: PoisonedSet, target: int | None, n: int, rng: torch.Generator
) -> Candidates:
    """`n` images of the poisoned training set at random, as many poisoned ones among them as among
    all, but `MIN_POISONED` at least.

    Covers are left out: they are neither clean nor poisoned. The target class is that of the
    labels as they are in the set.
    """
    real, untouched = (
        (~changes.covers).nonzero().squeeze(1),
        torch.ones(len(pool), dtype=torch.bool),
    )
    untouched[changes.positions] = False
    good = untouched.nonzero().squeeze(1)
    n = min(n, len(good) + len(real))
    wanted = min(len(real), max(MIN_POISONED, round(n * len(real) / (len(good) + len(real)))))
    bad, good = (
        those[torch.randperm(len(those), generator=rng)[:count]]
        for those, count in ((real, wanted), (good, n - wanted))
    )
    poisoned = ImageSet(changes.images[bad], changes.labels[bad], pool.classes)
    return _join(pool.subset(good), poisoned, target, torch.cat([good, changes.positions[bad]]))


def _join(clean: ImageSet, bad: ImageSet, target: int | None, places: Indices) -> Candidates:
    labels = torch.cat([clean.labels, bad.labels])
    return Candidates(
        torch.cat([clean.images, bad.images]),
        torch.arange(len(labels)) >= len(clean),
        labels == (-1 if target is None else target),
        places,
    )
