"""The unlearned model that a detector compares with, from files or from memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from rnp.detection.base import SampleDetector
from rnp.io.models import load_model
from rnp.types import Images, Logits
from rnp.unlearn import Unlearned

ACCURACY_LEVELS = ("0.8", "0.5", "0.2")
"""The unlearned checkpoints, by their accuracy."""

GetCheckpoint = Callable[[str], nn.Module]
"""The unlearned model at a level of `ACCURACY_LEVELS`.

It is `functools.partial(load_checkpoint, folder)` or
`functools.partial(restore_checkpoint, model, unlearned)`.
"""


def load_checkpoint(folder: Path, level: str) -> nn.Module:
    """The unlearned model when its accuracy first fell to `level`, from the folder of `unlearn`.

    It is the last model where the accuracy never fell so far.
    """
    path = folder / f"accuracy_{level}.safetensors"
    return load_model(path if path.exists() else folder / "accuracy_end.safetensors")[0]


def restore_checkpoint(model: nn.Module, unlearned: Unlearned, level: str) -> nn.Module:
    """The same from memory: a copy of `model` with the weights of a checkpoint, in eval mode."""
    restored = copy.deepcopy(model)
    end = unlearned.checkpoints["end"]
    restored.load_state_dict(unlearned.checkpoints.get(level, end))
    return restored.eval()


class EnsembleAverage(nn.Module):
    """Logits whose softmax is the mean of the members' softmax."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Images) -> Logits:
        confidences = [member(images).float().softmax(1) for member in self.members]
        return torch.stack(confidences).mean(0).clamp_min(1e-30).log()


def unlearned_for(detector: SampleDetector, get_checkpoint: GetCheckpoint, level: str) -> nn.Module:
    """The model that `detector` compares with: one checkpoint, or the mean of all of them."""
    if detector.needs_ensemble:
        return EnsembleAverage([get_checkpoint(each) for each in ACCURACY_LEVELS])
    return get_checkpoint(level)


def unlearned_by_detector(
    detectors: Sequence[SampleDetector], get_checkpoint: GetCheckpoint, level: str
) -> dict[str, nn.Module]:
    """The model of `unlearned_for` by the name of the detector; equal models are shared."""
    models: dict[bool, nn.Module] = {}
    for detector in detectors:
        if detector.needs_ensemble not in models:
            models[detector.needs_ensemble] = unlearned_for(detector, get_checkpoint, level)
    return {detector.name: models[detector.needs_ensemble] for detector in detectors}
