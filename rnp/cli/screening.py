"""Which images the detectors of samples judge, which unlearned model they ask, and how right they
are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rnp.attacks.base import Poisoned
from rnp.cli.options import generator
from rnp.detection.base import SampleDetector, judge
from rnp.io import load_model
from rnp.types import Bytes, DefenceSet, Images, ImageSet, Indices, Logits

LEVELS = ("0.8", "0.5", "0.2")
"""The unlearned checkpoints, by their accuracy."""
FEWEST = 20
"""Poisoned training images to look for, where there are as many: of fewer an AUROC says little."""


def checkpoint(unlearned: Path, level: str) -> nn.Module:
    """The unlearned model at the first fall below an accuracy; the last one where it never fell so
    far.
    """
    path = unlearned / f"accuracy_{level}.safetensors"
    return load_model(path if path.exists() else unlearned / "accuracy_end.safetensors")[0]


class Average(nn.Module):
    """Logits whose soft-max is the mean of those of `members`."""

    def __init__(self, members: list[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Images) -> Logits:
        return (
            torch.stack([member(images).float().softmax(1) for member in self.members])
            .mean(0)
            .clamp_min(1e-30)
            .log()
        )


def exposed(detector: SampleDetector, unlearned: Path, level: str) -> nn.Module:
    """The unlearned model that `detector` asks: the checkpoint at an accuracy, or the mean of all
    on the way.
    """
    return (
        Average([checkpoint(unlearned, each) for each in LEVELS])
        if detector.asks_average
        else checkpoint(unlearned, level)
    )


def consulted(detectors: list[SampleDetector], unlearned: Path, level: str) -> dict[str, nn.Module]:
    """The model that `exposed` gives each detector, by its name; those that ask the same one share
    it.
    """
    made: dict[bool, nn.Module] = {}
    for detector in detectors:
        if detector.asks_average not in made:
            made[detector.asks_average] = exposed(detector, unlearned, level)
    return {detector.name: made[detector.asks_average] for detector in detectors}


@dataclass(frozen=True)
class Suspects:
    """Images to judge, which of them carry a trigger, which belong to the target class, and where
    they lie in their set.
    """

    images: Bytes
    positives: Tensor  # bool [n]
    targets: Tensor  # bool [n]
    places: Indices

    def judge(self, scores: Tensor, own: Tensor, asks_unlearned: bool) -> dict[str, object]:
        return dataclasses.asdict(judge(scores, self.positives, self.targets, own)) | {
            "asks_unlearned": asks_unlearned
        }


def screened(tests: ImageSet, attacked: ImageSet, target: int | None, n: int) -> Suspects:
    """`n` clean and as many triggered test images.

    The triggered ones are taken from the end of their set, so that few of them repeat a clean one.
    """
    n = min(n, len(tests), len(attacked))
    good, bad = torch.arange(n), torch.arange(len(attacked) - n, len(attacked))
    return gathered(tests.subset(good), attacked.subset(bad), target, torch.cat([good, bad]))


def drawn(
    pool: ImageSet, changes: Poisoned, target: int | None, n: int, rng: torch.Generator
) -> Suspects:
    """`n` images of the poisoned training set at random, as many poisoned ones among them as among
    all, but `FEWEST` at least.

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
    wanted = min(len(real), max(FEWEST, round(n * len(real) / (len(good) + len(real)))))
    bad, good = (
        those[torch.randperm(len(those), generator=rng)[:count]]
        for those, count in ((real, wanted), (good, n - wanted))
    )
    poisoned = ImageSet(changes.images[bad], changes.labels[bad], pool.classes)
    return gathered(pool.subset(good), poisoned, target, torch.cat([good, changes.positions[bad]]))


def gathered(clean: ImageSet, bad: ImageSet, target: int | None, places: Indices) -> Suspects:
    labels = torch.cat([clean.labels, bad.labels])
    return Suspects(
        torch.cat([clean.images, bad.images]),
        torch.arange(len(labels)) >= len(clean),
        labels == (-1 if target is None else target),
        places,
    )


def ask(
    detector: SampleDetector,
    victim: nn.Module,
    images: Bytes,
    clean: DefenceSet,
    weak: nn.Module,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Scores of the screened images and of the defender's own, which set the threshold."""
    return tuple(
        detector.score(
            victim,
            each,
            clean.train,
            rng=generator(seed, f"samples/{detector.name}"),
            unlearned=weak,
        )
        for each in (images, clean.val.images)
    )


def curve(scores: Tensor, positives: Tensor) -> tuple:
    from sklearn.metrics import roc_auc_score, roc_curve

    fpr, tpr, _ = roc_curve(positives, scores)
    return fpr, tpr, roc_auc_score(positives, scores)
