"""Seconds and memory that poisoning takes: `python -m benchmarks.poison [ATTACK ...]`, each in a process of its own.

50,000 random images of CIFAR-10's size, ResNet-18 with 32 channels and random weights where an attack needs a model. `poison`
is all of it at the attack's own rate, the making of the trigger included; `stamp` puts the trigger on all 50,000. `copies` is
the peak of memory above that of the loaded data and model, in copies of the data (154 MB).
"""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import time

import torch

from rnp.attacks.base import trigger_images
from rnp.models.build import Architecture
from rnp.registry import load, names
from rnp.types import ImageSet

N = 50_000


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(name: str) -> str:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (N, 3, 32, 32), dtype=torch.uint8, generator=rng)
    clean = ImageSet(images, torch.arange(N) % 10, tuple("0123456789"))
    twin = Architecture(width=32).build(10, 3, torch.full((3,), 0.5), torch.full((3,), 0.25), rng=rng).eval()
    attack, before, start = load("attack", name)(), peak(), time.perf_counter()
    poisoned = attack.poison(clean, rng=rng, surrogate=twin)
    seconds, start = time.perf_counter() - start, time.perf_counter()
    trigger_images(poisoned.trigger, images)
    stamp = time.perf_counter() - start
    return f"| {name} | {len(poisoned.positions)} | {seconds:.2f} | {stamp:.2f} | {(peak() - before) / images.numel():.2f} |"


def main(chosen: list[str]) -> None:
    if len(chosen) == 1:
        return print(measure(chosen[0]))
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| attack | images changed | poison, s | stamp, s | copies |\n|---|---|---|---|---|")
    for name in chosen or names("attack"):
        print(subprocess.run([sys.executable, "-m", "benchmarks.poison", name], capture_output=True, text=True, check=True).stdout,
              end="", flush=True)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
