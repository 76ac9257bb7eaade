"""Runs `shortcuts` or `networks` for `test_narrow.py`, which starts it as a process."""

import sys

import torch
from torch import nn

from rnp.models.build import Architecture
from rnp.models.names import ARCHITECTURES
from rnp.models.resnet import subsample
from rnp.training.recipe import Train
from rnp.types import ImageSet
from rnp.unlearn import Unlearn

WIDTHS = range(1, 17)


def shortcut_error(inputs: int, stride: int) -> float:
    """Largest relative error of our shortcut against a strided convolution in float64.

    Compared are outputs and gradients.
    """
    torch.manual_seed(inputs)
    strided = nn.Conv2d(inputs, 8, 1, stride, bias=False).double()
    ours = nn.Conv2d(inputs, 8, 1, bias=False).to(memory_format=torch.channels_last)
    ours.load_state_dict(strided.state_dict())
    images = torch.randn(32, inputs, 16, 16, dtype=torch.float64, requires_grad=True)
    single = images.detach().float().contiguous(memory_format=torch.channels_last)
    single.requires_grad_()
    expected = strided(images)
    outputs = ours(subsample(single, stride))
    expected.square().sum().backward()
    outputs.square().sum().backward()
    pairs = (
        (expected, outputs),
        (strided.weight.grad, ours.weight.grad),
        (images.grad, single.grad),
    )
    return max(float((b - a).abs().max() / a.abs().max()) for a, b in pairs)


def train_and_unlearn(arch: str, width: int) -> None:
    """A step of each, on random images."""
    rng = torch.Generator().manual_seed(width)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=rng)
    data = ImageSet(images, torch.arange(8) % 4, ("a", "b", "c", "d"))
    model = Architecture(arch=arch, width=width).build_for(data, rng=rng)
    assert model.layout is torch.channels_last
    recipe = Train(epochs=1, batch_size=8, lr=1e-3)
    Unlearn(epochs=1, lr=1e-4, max_drop_per_step=0)(recipe(model, data, rng=rng), data, rng=rng)


def shortcuts() -> None:
    """Every width and stride, with one thread and with two."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for inputs in WIDTHS:
            for stride in (2, 4):
                error = shortcut_error(inputs, stride)
                case = f"{threads} threads, {inputs} channels, stride {stride}"
                assert error < 1e-5, f"{case}: {error}"


def networks() -> None:
    """Every architecture in every width."""
    torch.set_num_threads(1)
    for arch in ARCHITECTURES:
        for width in WIDTHS:
            print(arch, width, file=sys.stderr, flush=True)  # the last line is where it crashed
            train_and_unlearn(arch, width)


if __name__ == "__main__":
    {"shortcuts": shortcuts, "networks": networks}[sys.argv[1]]()
    print("done")
