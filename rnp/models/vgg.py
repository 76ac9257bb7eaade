"""VGG with and without BatchNorm, shaped for small images."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Plan = tuple[int | Literal["pool"], ...]
"""Convolutions by their channels, in units of `width`, and where the image is halved."""
VGG11: Plan = (1, "pool", 2, "pool", 4, 4, "pool", 8, 8, "pool", 8, 8)
VGG19: Plan = (1, 1, "pool", 2, 2, "pool", 4, 4, 4, 4, "pool", 8, 8, 8, 8, "pool", 8, 8, 8, 8)


class VGG(nn.Module):
    """3x3 convolutions with ReLU, and one linear layer on the mean over the image.

    Source: Simonyan and Zisserman, ICLR 2015.
    Differs: no last pooling and no hidden linear layers, for small images.
    """

    def __init__(self, plan: Plan, norm: bool, classes: int, *, channels: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for entry in plan:
            if entry == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            outputs = entry * width
            layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=not norm))
            if norm:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.ReLU())
            channels = outputs
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))
