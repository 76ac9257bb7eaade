"""Shared fixtures: generators, images whose class is their color, a network with two BatchNorms."""

import copy
import os
from pathlib import Path

import rnp  # isort: skip  # before PyTorch, since it sets how threads wait
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnp.training.device import use_precision
from rnp.training.recipe import Train
from rnp.types import ImageSet

COLORS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1.0]])

torch.set_num_threads(1)  # the networks are too small for more


@pytest.fixture(scope="session", autouse=True)
def own_environment():
    """Remove the user's settings for real runs from the environment of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RNP_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session", autouse=True)
def single_precision():
    """Methods compute in fp32 unless a test asks otherwise, on every processor alike.

    The scope includes the fixtures that train models. Commands have their own `--precision`.
    """
    with use_precision("fp32"):
        yield


class Toy(nn.Module):
    """Two convolutions, each with BatchNorm, then the mean over the image and a linear layer."""

    def __init__(self, classes: int, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="session")
def rng():
    """`rng(seed)`: a new generator."""
    return lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def toy_set(rng):
    """`toy_set(n, ...)`: noisy images, one color per class, some faint; labels are 0, 1, 2, ..."""

    def make(n=40, *, classes=4, size=8, channels=3, seed=0) -> ImageSet:
        generator = rng(seed)
        labels = torch.arange(n) % classes
        strength = 20 + 100 * torch.rand(n, 1, 1, 1, generator=generator)
        noise = torch.randint(-40, 41, (n, channels, size, size), generator=generator)
        images = 60 + strength * COLORS[labels][:, :channels, None, None] + noise
        return ImageSet(images.to(torch.uint8), labels, tuple(f"class{c}" for c in range(classes)))

    return make


@pytest.fixture(scope="session")
def toy_model():
    """`toy_model(...)`: random weights, with BatchNorm scales and biases that are not 1 and 0."""

    def make(*, classes=4, channels=3, width=8, seed=0) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Toy(classes, channels, width)
            for layer in (model.bn1, model.bn2):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.uniform_(layer.bias, -0.2, 0.2)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def _trained(toy_set, toy_model, rng):
    recipe = Train(epochs=10, batch_size=8, lr=0.1)
    return recipe(toy_model(), toy_set(80), rng=rng())


@pytest.fixture
def trained(_trained):
    """A toy model that classifies the toy set; a copy for each test."""
    return copy.deepcopy(_trained)


@pytest.fixture(scope="session")
def is_mapped():
    """`is_mapped(tensor)`: whether its memory is that of a file, according to the kernel."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")

    def is_file(tensor: torch.Tensor) -> bool:
        for line in maps.read_text().splitlines():
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            if low <= tensor.data_ptr() < high:
                return line.split()[4] != "0"  # the inode
        raise AssertionError("no such memory")

    return is_file


@pytest.fixture
def unchanged():
    """`unchanged(module)`: its weights and buffers must be the same at the end of the test."""
    watched = []

    def watch(module: nn.Module) -> nn.Module:
        watched.append((module, copy.deepcopy(module.state_dict())))
        return module

    yield watch
    for module, before in watched:
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
