"""Residual networks with the CIFAR stem: a 3x3 convolution without pooling."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def subsample(x: Tensor, stride: int) -> Tensor:
    """The pixels that a 1x1 convolution with this stride reads: every `stride`-th of each side.

    The shortcuts take these and convolve without a stride, which gives the same numbers. With a
    stride, oneDNN's backward pass for AVX2 writes past its memory where channels come last and are
    fewer than eight (oneDNN issue 6035).
    """
    # a mean over one pixel, which is faster than a slice
    return x if stride == 1 else F.avg_pool2d(x, 1, stride)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The layers that give subsampled inputs the shape of the outputs of a block."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


class Basic(nn.Module):
    """Two 3x3 convolutions, added to the input."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.shortcut = shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(subsample(x, self.stride)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, added to the input."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.stride = stride
        self.shortcut = shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(subsample(x, self.stride)))


class PreActivation(nn.Module):
    """`Basic` with norm and activation before each convolution.

    The shortcut, where the shapes differ, takes the output of the first activation.
    """

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.stride = stride
        same_shape = stride == 1 and inputs == width
        self.shortcut = None if same_shape else nn.Conv2d(inputs, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(subsample(out, self.stride))
        return skip + self.conv2(F.relu(self.bn2(self.conv1(out))))


class ResNet(nn.Module):
    """`blocks` per stage; each stage after the first halves the image and doubles the channels.

    The first stage has `width` channels, times the expansion of a block.
    Source: He et al., CVPR 2016; for pre-activation He et al., ECCV 2016.
    """

    def __init__(
        self,
        block: type[Basic | Bottleneck | PreActivation],
        blocks: tuple[int, ...],
        classes: int,
        *,
        channels: int,
        width: int,
    ) -> None:
        super().__init__()
        pre_activation = block is PreActivation
        self.conv1 = conv3x3(channels, width)
        self.bn1 = nn.Identity() if pre_activation else nn.BatchNorm2d(width)
        stages = []
        inputs = width
        for i, depth in enumerate(blocks):
            stage = []
            for j in range(depth):
                stage.append(block(inputs, width * 2**i, 2 if i > 0 and j == 0 else 1))
                inputs = width * 2**i * block.expansion
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(inputs) if pre_activation else None
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
    """`net` with GroupNorm in place of each BatchNorm.

    A group has at least eight channels, and there are 32 groups at most.
    Source: Wu and He, ECCV 2018, for the 32 groups.
    """
    for module in net.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                channels = child.num_features
                groups = math.gcd(channels, min(32, max(1, channels // 8)))
                setattr(module, name, nn.GroupNorm(groups, channels))
    return net
