"""The unlearned model that a detector compares with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rnp.detection.base import SampleDetector
from rnp.io.models import load_model
from rnp.types import Images, Logits

ACCURACY_LEVELS = ("0.8", "0.5", "0.2")
"""The unlearned checkpoints, by their accuracy."""


def load_checkpoint(unlearned: Path, level: str) -> nn.Module:
    """The unlearned model at the first fall below an accuracy; the last one where it never fell so
    far.
    """
    path = unlearned / f"accuracy_{level}.safetensors"
    return load_model(path if path.exists() else unlearned / "accuracy_end.safetensors")[0]


class EnsembleAverage(nn.Module):
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


def unlearned_for(detector: SampleDetector, unlearned: Path, level: str) -> nn.Module:
    """The unlearned model that `detector` asks: the checkpoint at an accuracy, or the mean of all
    on the way.
    """
    return (
        EnsembleAverage([load_checkpoint(unlearned, each) for each in ACCURACY_LEVELS])
        if detector.needs_ensemble
        else load_checkpoint(unlearned, level)
    )


def unlearned_by_detector(
    detectors: list[SampleDetector], unlearned: Path, level: str
) -> dict[str, nn.Module]:
    """The model that `unlearned_for` gives each detector, by its name; those that ask the same one share
    it.
    """
    made: dict[bool, nn.Module] = {}
    for detector in detectors:
        if detector.needs_ensemble not in made:
            made[detector.needs_ensemble] = unlearned_for(detector, unlearned, level)
    return {detector.name: made[detector.needs_ensemble] for detector in detectors}
