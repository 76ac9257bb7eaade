"""A network as every other part of rnp sees it: [0, 1] images in any memory layout in, logits out."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.types import Images

BLOCK = 16  # channels that oneDNN's kernels take at a time with AVX512; 8 with AVX2


class Classifier(nn.Module):
    """[0, 1] images -> logits: subtracts the mean, divides by the deviation of each channel, then runs `net`.

    Images are brought into the memory layout of the weights here and nowhere else. Channels come last, which is faster, unless
    `settle` finds a reason against it: `plain_because` says which.

    Raises: UserError when `net` answers with anything but one tensor.
    """

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.view(1, -1, 1, 1).clone())
        self.register_buffer("std", std.view(1, -1, 1, 1).clone())
        self.net = net
        self.lay_out()

    def lay_out(self, plain_because: str = "") -> Classifier:
        """Weights and images in plain layout where there is a reason to, else with channels last."""
        self.plain_because = plain_because
        self.layout = torch.contiguous_format if plain_because else torch.channels_last
        return self.to(memory_format=self.layout)

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self.layout)
        logits = self.net((images - self.mean) / self.std)
        if isinstance(logits, (tuple, list, dict)):  # in this order, for PyTorch traces with stand-ins for tensors
            raise UserError(f"{type(self.net).__name__} answers with a {type(logits).__name__} of {len(logits)} parts, not with one"
                            " tensor of logits; rnp repairs classifiers with one head")
        return logits


def settle(model: Classifier, images: Images) -> Classifier:
    """Look a network through once, with images that it takes, and choose its layout; its numbers stay as they are.

    Plain is the layout of networks with a `risky` layer, and of those that run in no other: many flatten with `view`. One that
    runs in neither is left with channels last; whoever runs it next says what is wrong.
    """
    layer = risky(model.net)
    if layer:
        return model.lay_out(f"layer {layer} is a 1x1 convolution with a stride and fewer than {BLOCK} input channels")
    error = failure(model.lay_out(), images)
    if error is None or failure(model.lay_out("it fails with channels last"), images) is not None:
        return model.lay_out()
    return model.lay_out(f"with channels last it fails: {textwrap.shorten(str(error), 90)}")


def risky(net: nn.Module) -> str:
    """The name of the first layer that is not safe with channels last; empty when all are.

    It is a convolution that takes single pixels with a stride, from fewer channels than a kernel takes at a time: oneDNN's
    backward pass for AVX2 writes past its memory (issue 6035 there). Of 2,976 shapes with channels last (kernels of 1 to 5 pixels,
    strides of 1 to 4, 1 to 24 channels, with groups and without) those below 8 channels failed and no others; none failed in
    plain layout, and none with AVX512.
    """
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.in_channels < BLOCK:
            if max(layer.kernel_size) == 1 < max(layer.stride):
                return name
    return ""


@torch.no_grad()
def failure(model: nn.Module, images: Images) -> Exception | None:
    """What the model raises for these images, in eval mode."""
    try:
        with evaluating(model):
            model(images)
    except Exception as error:  # whatever a stranger's network stumbles over
        return error
    return None


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of `model` in eval mode; afterwards each module is in the mode in which it was, so that frozen BatchNorm stays frozen."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
