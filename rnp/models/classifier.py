"""A network as every other part of rnp sees it: [0, 1] images in any memory layout in, logits
out.
"""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rnp.errors import UserError
from rnp.types import Images

BLOCK = 16  # channels that oneDNN's kernels take at a time with AVX512; 8 with AVX2
UNSAFE = (
    "a 1x1 convolution with a stride and few channels, on which oneDNN can crash when channels come"
    " last"
)


class Classifier(nn.Module):
    """[0, 1] images -> logits: subtracts the mean, divides by the deviation of each channel, then
    runs `net`.

    Images are brought into the memory layout of the weights here and nowhere else. Channels come
    last, which is faster, unless there is a reason against it, which `plain_because` says: one is
    found in the layers, others by `settle`.

    Raises: UserError when `net` answers with anything but one tensor.
    """

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.view(1, -1, 1, 1).clone())
        self.register_buffer("std", std.view(1, -1, 1, 1).clone())
        self.net = net
        self.lay_out(risky(net))

    def lay_out(self, plain_because: str = "") -> Classifier:
        """Weights and images in plain layout where there is a reason to, else with channels
        last.
        """
        self.plain_because = plain_because
        return self.to(memory_format=self.layout)

    @property
    def layout(self) -> torch.memory_format:
        return torch.contiguous_format if self.plain_because else torch.channels_last

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self.layout)
        logits = self.net((images - self.mean) / self.std)
        if isinstance(
            logits, (tuple, list, dict)
        ):  # in this order, for PyTorch traces with stand-ins for tensors
            raise UserError(
                f"{type(self.net).__name__} answers with a {type(logits).__name__} of {len(logits)}"
                " parts, not with one tensor of logits; rnp repairs classifiers with one head"
            )
        return logits


def settle(model: Classifier, images: Images) -> Classifier:
    """Look at a network while it runs in eval mode on `images`, two or more that it takes, and
    choose its layout.

    It gets plain layout where it does not run with channels last and does without (many flatten
    with `view`), and where it runs a convolution that is not safe. Its weights stay as they are.

    Raises: UserError when it runs in no layout, or when an unsafe convolution has channels last
    whatever we give it.
    """
    reason = failing(model, images)
    if reason and not model.plain_because:
        reason = failing(model.lay_out(reason), images)
    if reason:
        size = " x ".join(map(str, images.shape[1:]))
        raise UserError(
            f"{type(model.net).__name__} cannot be used with images of {size} (is that the size it"
            f" takes?): {reason}"
        )
    return model


@torch.no_grad()
def failing(model: Classifier, images: Images) -> str:
    """Why the model should not run as it is laid out; empty when it may.

    Raises: UserError when that is what it raises; OutOfMemoryError.
    """
    try:
        with evaluating(model), Watch() as watch:
            model(images)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a stranger's network stumbles over
        layout = "in plain layout" if model.plain_because else "with channels last"
        return f"it fails {layout}, {type(error).__name__}: {textwrap.shorten(str(error), 90)}"
    return f"it runs {UNSAFE}" if watch.seen else ""


def risky(net: nn.Module) -> str:
    """Why a network should have plain layout, as far as its layers tell; empty when they tell
    nothing.
    """
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and unsafe(
            layer.in_channels, layer.kernel_size, layer.stride, layer.groups
        ):
            return f"layer {name} is {UNSAFE}"
    return ""


def unsafe(channels: int, kernel: Sequence[int], stride: Sequence[int], groups: int) -> bool:
    """Whether a convolution can write past its memory when channels come last: oneDNN's backward
    pass for AVX2 does.

    It does so where single pixels are read with a stride, from fewer channels than a kernel takes
    at a time (issue 6035 there). Of 2,976 shapes with channels last (kernels of 1 to 5 pixels,
    strides of 1 to 4, 1 to 24 channels, with groups and without) only such ones failed, with 2 to
    7 channels; none did in plain layout, and none with AVX512, whose kernels take 16 channels.
    What may fail on one processor counts everywhere, so that results do not depend on it.
    """
    return groups == 1 and channels < BLOCK and max(kernel) == 1 < max(stride)


class Watch(TorchDispatchMode):
    """While it lasts it sees whether an unsafe convolution runs with channels last, by whatever
    name and layout it got there.
    """

    def __enter__(self) -> Watch:
        self.seen = False
        return super().__enter__()

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if function is torch.ops.aten.convolution.default:
            images, weight, _, stride, *_, groups = args
            self.seen |= unsafe(images.shape[1], weight.shape[2:], stride, groups) and any(
                map(channels_last, (images, weight))
            )
        return function(*args, **(kwargs or {}))


def channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of `model` in eval mode; afterwards each module is in the mode in which it was, so that
    frozen BatchNorm stays frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
