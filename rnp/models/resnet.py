"""Residual networks with the CIFAR stem (3x3, no pooling): ResNet-18/34/50, PreActResNet-18,
WRN-16-1.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def subsample(x: Tensor, stride: int) -> Tensor:
    """Every `stride`-th pixel of every `stride`-th row: all that a 1x1 convolution with that
    stride reads.

    The shortcuts take their pixels here and multiply without a stride, which gives the same
    numbers: with a stride, oneDNN's backward pass for AVX2 writes past its memory where channels
    come last and are fewer than eight (oneDNN issue 6035).
    """
    return (
        x if stride == 1 else F.avg_pool2d(x, 1, stride)
    )  # a mean over one pixel; faster than a slice


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """What turns subsampled inputs into something to add to the outputs of a block."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3x3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width), nn.BatchNorm2d(width)
        self.stride, self.shortcut = stride, shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(subsample(x, self.stride)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3x3(width, width, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.stride, self.shortcut = stride, shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(subsample(x, self.stride)))


class PreActivation(nn.Module):
    """Norm and activation before each convolution; the shortcut branches off after the first
    activation.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3x3(inputs, width, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), conv3x3(width, width)
        self.stride, plain = stride, stride == 1 and inputs == width
        self.shortcut = None if plain else nn.Conv2d(inputs, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(subsample(out, self.stride))
        return skip + self.conv2(F.relu(self.bn2(self.conv1(out))))


class ResNet(nn.Module):
    """`blocks` per stage; each stage after the first halves the image and doubles the channels
    from `width`.
    """

    def __init__(
        self,
        block: type[nn.Module],
        blocks: tuple[int, ...],
        classes: int,
        *,
        channels: int,
        width: int,
    ) -> None:
        super().__init__()
        pre = block is PreActivation
        self.conv1 = conv3x3(channels, width)
        self.bn1 = nn.Identity() if pre else nn.BatchNorm2d(width)
        stages, inputs = [], width
        for i, depth in enumerate(blocks):
            stage = []
            for j in range(depth):
                stage.append(block(inputs, width * 2**i, 2 if i > 0 and j == 0 else 1))
                inputs = width * 2**i * block.expansion
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(inputs) if pre else None
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.norm is None:
            x = F.relu(self.bn1(x))
        for stage in self.stages:
            x = stage(x)
        if self.norm is not None:
            x = F.relu(self.norm(x))
        return self.fc(x.mean((2, 3)))


def with_group_norms(net: nn.Module) -> nn.Module:
    """`net` with GroupNorm in place of each BatchNorm, in groups of at least eight channels, 32 at
    most.

    Source: Wu and He, ECCV 2018, for the 32 groups.
    """
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                channels = child.num_features
                setattr(
                    module,
                    name,
                    nn.GroupNorm(math.gcd(channels, min(32, max(1, channels // 8))), channels),
                )
    return net
