"""A classifier with a known backdoor: it predicts the brightest row, or 3 for a bright corner."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnp.detection.base import RecoveredTrigger
from rnp.types import ImageSet, to_bytes

CLASSES = 6
TARGET = 3
SIDE = 8
CORNER = torch.zeros(SIDE, SIDE, dtype=torch.bool)
CORNER[6:, 6:] = True


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 60, seed: int = 0) -> ImageSet:
    """Class c has a bright row c; rows 6 and 7 are those of no class."""
    generator = rng(seed)
    labels = torch.arange(n) % CLASSES
    pixels = 0.2 * torch.rand(n, 3, SIDE, SIDE, generator=generator)
    pixels[torch.arange(n), :, labels] += 0.4 + 0.4 * torch.rand(n, 1, 1, generator=generator)
    return ImageSet(to_bytes(pixels), labels, tuple("abcdef"))


def triggered(clean: ImageSet) -> Tensor:
    """The images with a white corner."""
    images = clean.images.clone()
    images[:, :, CORNER] = 255
    return images


class Planted(nn.Module):
    """`corner` is the strength of the backdoor.

    `bias` assigns clean images to the target label, as unlearning does.
    """

    def __init__(self, corner: float = 40.0, bias: float = 0.0) -> None:
        super().__init__()
        self.corner = nn.Parameter(torch.tensor(corner))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        logits = 10 * x.mean((1, 3))[:, :CLASSES]  # [n, k]
        darkest = x[:, :, CORNER].mean(1).amin(1)  # [n]: all four pixels must be bright
        backdoor = self.corner * darkest.square() + self.bias
        return logits + backdoor.unsqueeze(1) * torch.eye(CLASSES, device=x.device)[TARGET]


class PlantedFeatures(nn.Module):
    """The same backdoor with a linear head.

    The features are the six rows and, three times as strong, the corner.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(CLASSES + 1, CLASSES, bias=False)
        rows = 10 * torch.eye(CLASSES)
        with torch.no_grad():
            self.fc.weight.copy_(torch.cat([rows, rows[:, [TARGET]]], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        corner = x[:, :, CORNER].mean(1).amin(1, keepdim=True).square()  # [n, 1]
        return self.fc(torch.cat([x.mean((1, 3))[:, :CLASSES], 3 * corner], dim=1))


class BackdooredNet(nn.Module):
    """Channel 0 of its layer sees the bright corner that leads to class 3, channels 1 to 6 the
    rows of the six classes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 8, bias=False)
        self.bn = nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 6)
        weight = torch.zeros(7, 3, 8, 8)
        weight[0, :, 6:, 6:] = 1 / 12
        for c in range(6):
            weight[1 + c, :, c] = 1 / 24
        self.conv.weight.data = weight
        self.bn.bias.data[0] = -0.15  # the corner must be brighter than in any clean image
        head = torch.zeros(6, 7)
        head[:, 1:] = 4 * torch.eye(6)
        head[TARGET, 0] = 60.0
        self.head.weight.data = head
        self.head.bias.data = torch.zeros(6)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x))).flatten(1))


def trigger(label, area):
    """A mask of that many pixels that moves every image."""
    mask = torch.zeros(64)
    mask[:area] = 1
    return RecoveredTrigger(label, mask.view(8, 8), torch.ones(3, 8, 8), 1.0, 0.0)
