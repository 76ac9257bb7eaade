"""The network that all of rnp works with: images in [0, 1], in any memory layout, to logits."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rnp.errors import UserError
from rnp.types import Images

KERNEL_CHANNELS = 16
"""Channels that oneDNN's kernels take at a time with AVX512; 8 with AVX2."""
TINY = 1e-30
"""Probabilities below this count as this much, so that their logarithm is finite."""
UNSAFE = (
    "a 1x1 convolution with a stride and few channels, on which oneDNN can crash when channels come"
    " last"
)


class Classifier(nn.Module):
    """Images in [0, 1] -> logits: normalizes each channel, then runs `net`.

    This is the only place that chooses a memory layout. Channels come last, which is faster, unless
    `contiguous_reason` says why the weights and images must be contiguous: the constructor finds a
    reason in the layers, `choose_layout` in a run.

    Raises: UserError when `net` returns anything but one tensor.
    """

    mean: Tensor
    std: Tensor
    contiguous_reason: str
    gives_probabilities: bool
    """Whether `net` ends in a softmax; the logarithm of its outputs then serves as logits."""

    def __init__(self, net: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.view(1, -1, 1, 1).clone())
        self.register_buffer("std", std.view(1, -1, 1, 1).clone())
        self.net = net
        self.gives_probabilities = False
        self.set_layout(find_unsafe_layer(net))

    def set_layout(self, contiguous_reason: str = "") -> Classifier:
        """Make the weights contiguous if there is a reason to, else put their channels last."""
        self.contiguous_reason = contiguous_reason
        return self.to(memory_format=self.layout)

    @property
    def layout(self) -> torch.memory_format:
        """The memory layout of weights and images."""
        return torch.contiguous_format if self.contiguous_reason else torch.channels_last

    def forward(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self.layout)
        logits = self.net((images - self.mean) / self.std)
        # not `not isinstance(logits, Tensor)`: PyTorch traces with stand-ins for tensors
        if isinstance(logits, (tuple, list, dict)):
            raise UserError(
                f"{type(self.net).__name__} returns a {type(logits).__name__} of {len(logits)}"
                " parts, not one tensor of logits; rnp repairs classifiers with one head"
            )
        if self.gives_probabilities:
            return logits.float().clamp_min(TINY).log()
        return logits


def choose_layout(model: Classifier, images: Images) -> Classifier:
    """Choose the memory layout by running the model in eval mode on `images`; two or more.

    It becomes contiguous if it runs only so (many networks flatten with `view`), or if it runs an
    unsafe convolution with channels last. Its weights stay as they are.

    Raises: UserError when it runs in no layout, or runs an unsafe convolution with channels last
    even when it is contiguous.
    """
    failure = layout_failure(model, images)
    if failure and not model.contiguous_reason:
        failure = layout_failure(model.set_layout(failure), images)
    if failure:
        size = " x ".join(map(str, images.shape[1:]))
        raise UserError(
            f"{type(model.net).__name__} cannot be used with images of {size} (is that the size it"
            f" takes?): {failure}"
        )
    return model


@torch.no_grad()
def layout_failure(model: Classifier, images: Images) -> str:
    """Why the model must not run in its present layout; empty when it may.

    Raises: UserError and OutOfMemoryError when the model raises them.
    """
    try:
        with evaluating(model), ConvolutionMonitor() as monitor:
            model(images)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # an untrusted network can raise anything
        layout = "when contiguous" if model.contiguous_reason else "with channels last"
        return f"it fails {layout}, {type(error).__name__}: {textwrap.shorten(str(error), 90)}"
    return f"it runs {UNSAFE}" if monitor.saw_unsafe else ""


def find_unsafe_layer(net: nn.Module) -> str:
    """Names the first layer that is unsafe with channels last; empty when there is none."""
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d) and is_unsafe(
            layer.in_channels, layer.kernel_size, layer.stride, layer.groups
        ):
            return f"layer {name} is {UNSAFE}"
    return ""


def is_unsafe(channels: int, kernel: Sequence[int], stride: Sequence[int], groups: int) -> bool:
    """Whether oneDNN can write past its memory in this convolution when channels come last.

    Its backward pass for AVX2 does so where a 1x1 kernel has a stride and fewer input channels
    than it takes at a time (issue 6035 there). Of 2,976 shapes with channels last (kernels of 1 to
    5 pixels, strides of 1 to 4, 1 to 24 channels, with groups and without) only such ones failed,
    with 2 to 7 channels; none did when contiguous, and none with AVX512, whose kernels take 16
    channels. What may fail on one processor counts everywhere, so that results do not depend on it.
    """
    return groups == 1 and channels < KERNEL_CHANNELS and max(kernel) == 1 < max(stride)


class ConvolutionMonitor(TorchDispatchMode):
    """A context that records in `saw_unsafe` whether an unsafe convolution ran channels last."""

    saw_unsafe = False

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        if func is torch.ops.aten.convolution.default:
            images, weight, _, stride, *_, groups = args
            last = is_channels_last(images) or is_channels_last(weight)
            if last and is_unsafe(images.shape[1], weight.shape[2:], stride, groups):
                self.saw_unsafe = True
        return func(*args, **(kwargs or {}))


def is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all of `model` in eval mode; afterwards each module gets its own mode back.

    So frozen BatchNorm stays frozen.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def are_probabilities(outputs: Tensor) -> bool:
    """Whether each row of `outputs` is a distribution over several classes."""
    sums = outputs.sum(1)
    return (
        outputs.shape[1] > 1
        and bool((outputs >= 0).all())
        and torch.allclose(sums, torch.ones_like(sums), atol=1e-4)
    )
