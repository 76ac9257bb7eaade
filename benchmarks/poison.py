"""Seconds and memory that poisoning takes: `python -m benchmarks.poison [ATTACK ...]`, each in a
process of its own.

50,000 random images of CIFAR-10's size, ResNet-18 with 32 channels and random weights where an
attack needs a model. `poison` is all of it at the attack's own rate, the making of the trigger
included; `stamp` puts the trigger on all 50,000. `copies` is the peak of memory above that of the
loaded data and model, in copies of the data (154 MB).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import torch

from benchmarks.subprocesses import peak_memory
from rnp.attacks.base import trigger_images
from rnp.models.build import Architecture
from rnp.registry import load, names
from rnp.reporting.provenance import device_name
from rnp.types import ImageSet

N = 50_000


def measure(name: str) -> dict[str, float]:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=rng)
    clean = ImageSet(images, torch.arange(N) % 10, tuple("0123456789"))
    benign = (
        Architecture(width=32)
        .build(10, 3, torch.full((3,), 0.5), torch.full((3,), 0.25), rng=rng)
        .eval()
    )
    attack, before, start = load("attack", name)(), peak_memory(), time.perf_counter()
    poisoned = attack.poison(clean, rng=rng, surrogate=benign)
    seconds, start = time.perf_counter() - start, time.perf_counter()
    trigger_images(poisoned.trigger, images)
    stamp = time.perf_counter() - start
    return {
        "changed": len(poisoned.positions),
        "seconds": seconds,
        "stamp_seconds": stamp,
        "copies": (peak_memory() - before) / images.numel(),
    }


def line(name: str, found: dict[str, float]) -> str:
    """A row of the table."""
    return (
        f"| {name} | {found['changed']} | {found['seconds']:.2f} | {found['stamp_seconds']:.2f} |"
        f" {found['copies']:.2f} |"
    )


def main(chosen: list[str]) -> None:
    print(f"{device_name()}, torch {torch.__version__}\n")
    print("| attack | images changed | poison, s | stamp, s | copies |\n|---|---|---|---|---|")
    for name in chosen or names("attack"):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.measure", "poison", json.dumps({"name": name})],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        print(line(name, json.loads(done.stdout.splitlines()[-1])), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
