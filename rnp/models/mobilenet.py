"""MobileNetV2, shaped for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels in 32nds of `width`, repeats, stride of the first repeat.

Table 2 of the paper, with smaller strides for CIFAR.
"""


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection; added to the input where shapes agree."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv1 = nn.Conv2d(inputs, hidden, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.has_skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu6(self.bn1(self.conv1(x)))
        out = F.relu6(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return x + out if self.has_skip else out


class MobileNetV2(nn.Module):
    """A stem, inverted residual blocks, and a 1x1 convolution before the classifier.

    Source: Sandler et al., CVPR 2018, table 2.
    """

    def __init__(self, classes: int, *, channels: int, width: int) -> None:
        super().__init__()
        inputs = width
        self.conv1 = nn.Conv2d(channels, inputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        blocks = []
        for expansion, share, repeats, stride in BLOCKS:
            for i in range(repeats):
                outputs = max(4, share * width // 32)
                blocks.append(InvertedResidual(inputs, outputs, expansion, stride if i == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(inputs, 40 * width, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(40 * width)
        self.fc = nn.Linear(40 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu6(self.bn1(self.conv1(x))))
        return self.fc(F.relu6(self.bn2(self.conv2(x))).mean((2, 3)))
