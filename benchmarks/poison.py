"""Seconds and memory that poisoning takes: `python -m benchmarks.poison [ATTACK ...]`, each in a
process of its own.

50,000 random images of CIFAR-10's size, ResNet-18 with 32 channels and random weights where an
attack needs a model. `poison` is all of it at the attack's own rate, the making of the trigger
included; `stamp` applies the trigger to all 50,000. `copies` is the peak of memory above that of
the loaded data and model, in copies of the data (154 MB).
"""

from __future__ import annotations

import sys
import time
from typing import cast

import torch

from benchmarks.subprocesses import measure as measure_in_own_process
from benchmarks.subprocesses import peak_memory
from rnp.attacks.base import Attack, trigger_images
from rnp.models.build import Architecture
from rnp.registry import load, names
from rnp.reporting.provenance import device_name
from rnp.types import ImageSet

N = 50_000


def measure(name: str) -> dict[str, float]:
    """The numbers of one attack."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=rng)
    clean = ImageSet(images, torch.arange(N) % 10, tuple("0123456789"))
    mean = torch.full((3,), 0.5)
    benign = Architecture(width=32).build(10, 3, mean, mean / 2, rng=rng).eval()
    attack = cast("type[Attack]", load("attack", name))()
    before = peak_memory()
    start = time.perf_counter()
    poisoned = attack.poison(clean, rng=rng, surrogate=benign)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    trigger_images(poisoned.trigger, images)
    return {
        "changed": len(poisoned.positions),
        "seconds": seconds,
        "stamp_seconds": time.perf_counter() - start,
        "copies": (peak_memory() - before) / images.numel(),
    }


def line(name: str, numbers: dict[str, float]) -> str:
    """A row of the table."""
    columns = ("seconds", "stamp_seconds", "copies")
    cells = " | ".join(f"{numbers[column]:.2f}" for column in columns)
    return f"| {name} | {numbers['changed']} | {cells} |"


def main(attacks: list[str]) -> None:
    print(f"{device_name()}, torch {torch.__version__}\n")
    print("| attack | images changed | poison, s | stamp, s | copies |\n|---|---|---|---|---|")
    for name in attacks or names("attack"):
        print(line(name, measure_in_own_process("poison", name=name)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
