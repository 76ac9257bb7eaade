"""Measurements of training: the loop that most people write, and ours."""

from __future__ import annotations

import dataclasses
import itertools
import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.subprocesses import Result
from benchmarks.timing import timed
from rnp.cli.prepare import data_root
from rnp.clock import now
from rnp.data.cifar10 import Cifar10
from rnp.errors import UserError
from rnp.models.build import Architecture, statistics
from rnp.training.device import Precision, default_device, use_precision
from rnp.training.loop import steps_per_epoch
from rnp.training.malloc import keep_freed_pages
from rnp.training.recipe import Train
from rnp.training.work import count_pass
from rnp.types import ImageSet


def pictures(n: int) -> ImageSet:
    """CIFAR-10's first training images; random ones where it is not available."""
    try:
        return Cifar10().load(data_root(), rng=torch.Generator())[0].subset(torch.arange(n))
    except UserError:
        return noise(n)


def noise(n: int) -> ImageSet:
    """Random images of CIFAR-10's size."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=rng)
    return ImageSet(images, torch.arange(n) % 10, tuple("0123456789"))


class Pictures(Dataset):
    """CIFAR-10 as torchvision returns it: PIL images through the usual transforms, one by one."""

    def __init__(self, data: ImageSet) -> None:
        from torchvision import transforms

        self.arrays = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.labels.tolist()
        mean, std = statistics(data)
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(data.shape[1], padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean.tolist(), std.tolist()),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


def train_plain(width: int, batch: int, steps: int, warm_up: int, workers: int) -> Result:
    """The loop that most people write, in fp32; the loader never runs out of images."""
    data = pictures(min(50_000, 2 * (steps + warm_up) * batch))
    device = default_device()
    net = Architecture(width=width).build_for(data, rng=torch.Generator().manual_seed(0)).net
    net = net.to(device, memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(
        Pictures(data), batch_size=batch, shuffle=True, num_workers=workers, drop_last=True
    )
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def train(n: int) -> float:
        total = 0.0
        for images, labels in itertools.islice(batches, n):
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        return total

    train(warm_up)
    _, numbers = timed(lambda: train(steps))
    return numbers | {"images_per_second": steps * batch / numbers["seconds"]}


def train_ours(width: int, batch: int, steps: int, warm_up: int, precision: Precision) -> Result:
    """`Train` for as many steps, after a shorter run.

    On a GPU the capture of CUDA graphs is part of the seconds, and the rate of all epochs but the
    first is given too.
    """
    keep_freed_pages()
    data = pictures(min(50_000, steps * batch))
    rng = torch.Generator().manual_seed(0)
    model = Architecture(width=width).build_for(data, rng=rng).to(default_device())
    ends: list[float] = []
    epochs = max(1, round(steps / steps_per_epoch(len(data), batch)))
    recipe = Train(epochs=epochs, batch_size=batch, lr=0.1, weight_decay=0.001)
    with use_precision(precision):
        short = dataclasses.replace(recipe, epochs=1)
        short(model, data.subset(torch.arange(warm_up * batch)), rng=rng)
        _, numbers = timed(
            lambda: recipe(model, data, rng=rng, on_epoch=lambda epoch: ends.append(now()))
        )
    numbers["images_per_second"] = len(data) * epochs / numbers["seconds"]
    if default_device().type == "cuda":
        rate = numbers["images_per_second"]
        if epochs > 1:
            rate = (epochs - 1) * len(data) / (ends[-1] - ends[0])
        numbers |= {
            "steady_images_per_second": rate,
            "flops": 6 * count_pass(model, data.images) * rate,
            "peak_flops": product_peak(),
        }
    return numbers


def training_steps(steps: int, limit: float) -> Result:
    """Steps of a small network in fp32, whose threads wait for one another often.

    It is the network of the preset demo, with 32 images a step. There are at most `steps`, and
    none after `limit` seconds.
    """
    keep_freed_pages()
    data = noise(32)
    rng = torch.Generator().manual_seed(0)
    model = Architecture(arch="resnet10", width=16).build_for(data, rng=rng).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = data.as_floats()

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), data.labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    count = 0
    start = time.perf_counter()
    while count < steps and time.perf_counter() - start < limit:
        step()
        count += 1
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "steps": count,
        "milliseconds": 1000 * seconds / count,
        "threads": torch.get_num_threads(),
    }


def product_peak(side: int = 8192, times: int = 20) -> float:
    """Floating-point operations a second of a large bf16 matrix product."""
    a, b = (
        torch.randn(side, side, device=default_device(), dtype=torch.bfloat16) for _ in range(2)
    )
    for _ in range(3):
        a @ b
    start = now()
    for _ in range(times):
        a @ b
    return 2 * side**3 * times / (now() - start)
