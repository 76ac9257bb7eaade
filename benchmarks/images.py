"""Large images: speed and memory from the files to a trained model: `python -m benchmarks.images
[N] [SIDE]`.

Makes N JPEGs of 224 to 500 pixels in ten classes (seeded; low-frequency noise, a disc in the
color of the class, fine noise), then prepares, poisons and trains on squares of SIDE pixels, each
stage in a process of its own, and prints a table. `train` is the stage without its epochs: the
poisoned set, a few steps, the triggered test set, and accuracies on some of its images. Files,
some 500 kB an image of 224 pixels in all, go to --folder; temporary maps go to TMPDIR.

Memory is that of a stage above what its process had before it, which for `train` is the model, one
step and one forward pass on random images. *Anonymous* memory cannot be taken back from the
process. *Resident* memory adds the pages of mapped files that were read; the kernel takes those
back when memory is short. Both come from /proc, so this needs Linux.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = 10
DECODED = 2000  # images, at most, whose decoding is timed
EVALUATED = 256
GATHERED = 20  # batches whose preparation is timed


def measure(
    n: int = 20_000,
    side: int = 224,
    *,
    steps: int = 50,
    batch: int = 16,
    arch: str = "torchvision:resnet18",
    folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """The numbers of each stage; files go to a temporary folder in `folder`, which is removed."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        path = Path(work)
        rows = {"make": make(path / "images", n)}
        for workers in (1, cores()):
            name = f"decode, {workers} worker{'s' * (workers > 1)}"
            rows[name] = in_own_process(decode, path, side, workers)
        rows["prepare"] = in_own_process(prepare, path, side)
        rows["poison"] = in_own_process(poison, path, side, arch)
        rows["train"] = in_own_process(train, path, side, arch, steps, batch)
    return rows


def table(rows: dict[str, dict[str, float]]) -> Iterator[str]:
    """The lines of a Markdown table, and a sentence about training."""
    yield "| stage | seconds | images | images/s | before, MB | anonymous, MB | resident, MB |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in rows.items():
        memory = (
            f"{row[key] / 1e6:.0f}" if key in row else "–"
            for key in ("before", "anonymous", "resident")
        )
        yield (
            f"| {name} | {row['seconds']:.1f} | {row['images']} |"
            f" {row['images'] / row['seconds']:.0f} | {' | '.join(memory)} |"
        )
    inputs, step = (rows["train"][f"{key}_images_per_second"] for key in ("input", "step"))
    yield (
        f"\nIn training the preparation of a batch alone (gather, to floats, augment) gives"
        f" {inputs:.0f} images/s, a whole step {step:.1f}."
    )


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_own_process(stage: Callable[..., dict], *arguments: object) -> dict[str, float]:
    """The numbers of a stage that runs in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(stage, *arguments).result()


def make(folder: Path, n: int) -> dict[str, float]:
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
    start = time.perf_counter()
    with ProcessPoolExecutor(cores(), mp_context=multiprocessing.get_context("spawn")) as pool:
        size = sum(pool.map(functools.partial(paint, folder), range(n), chunksize=100))
    return {"seconds": time.perf_counter() - start, "images": n, "bytes": size}


def paint(folder: Path, i: int) -> int:
    """Write image `i`; the size of the file."""
    draw, label = random.Random(i), i % CLASSES
    width, height = draw.randint(224, 500), draw.randint(224, 500)
    picture = Image.frombytes("RGB", (8, 8), draw.randbytes(192)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    left, top, side = draw.randrange(width // 2), draw.randrange(height // 2), draw.randint(60, 160)
    ImageDraw.Draw(picture).ellipse(
        (left, top, left + side, top + side), fill=f"hsl({360 * label // CLASSES}, 90%, 50%)"
    )
    path = folder / f"class{label}" / f"{i:07}.jpg"
    Image.blend(picture, grain().crop((0, 0, width, height)), 0.25).save(path, quality=85)
    return path.stat().st_size


@functools.cache
def grain() -> Image.Image:
    noise = np.random.default_rng(0).normal(128, 40, (500, 500)).clip(0, 255)
    return Image.fromarray(noise.astype(np.uint8)).convert("RGB")


def resident() -> tuple[int, ...]:
    """Anonymous and all resident memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return tuple(1024 * int(values[key].split()[0]) for key in ("RssAnon", "VmRSS"))


class MemoryWatch:
    """Seconds, memory before, and the peaks above it while the block runs, read every 5 ms."""

    def __enter__(self) -> MemoryWatch:
        self.before = resident()
        self.stop = threading.Event()
        self.peaks = self.before
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        self.start = time.perf_counter()
        return self

    def _look(self) -> None:
        while not self.stop.wait(0.005):
            self.peaks = tuple(map(max, self.peaks, resident()))

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.stop.set()
        self.thread.join()

    def row(self, images: int) -> dict[str, float]:
        anonymous, total = (peak - before for peak, before in zip(self.peaks, self.before))
        return {
            "seconds": self.seconds,
            "images": images,
            "before": self.before[0],
            "anonymous": anonymous,
            "resident": total,
        }


def decode(work: Path, side: int, workers: int) -> dict[str, float]:
    from rnp.data.imagefolder import decode, flatten_classes, scan
    from rnp.training.malloc import keep_freed_pages

    keep_freed_pages()
    os.environ["RNP_WORKERS"] = str(workers)
    files, _ = flatten_classes(scan(work / "images"))
    files = files[:: max(1, len(files) // DECODED)]
    for file in files:
        file.read_bytes()  # so that for both numbers of workers they are in the page cache
    with MemoryWatch() as watch:
        decode([files], side)
    return watch.row(len(files))


def prepare(work: Path, side: int) -> dict[str, float]:
    from rnp.cli.prepare import prepare
    from rnp.training.malloc import keep_freed_pages

    keep_freed_pages()
    n = sum(1 for _ in (work / "images").glob("*/*.jpg"))
    half = min(500, n // 10)
    options = {"path": work / "images", "size": side, "defense-train": half, "defense-val": half}
    files = {"out": work / "data", "report": work / "report"}
    with MemoryWatch() as watch:
        prepare.main(["imagefolder", *flags(options | files)], standalone_mode=False)
    return watch.row(n)


def flags(options: Mapping[str, object]) -> list[str]:
    """The words of a command line."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def poison(work: Path, side: int, arch: str) -> dict[str, float]:
    import torch

    from rnp.cli.poison import poison
    from rnp.io.datasets import load_images
    from rnp.io.models import save_model
    from rnp.models.build import Architecture
    from rnp.training.malloc import keep_freed_pages

    keep_freed_pages()
    pool = load_images(work / "data/pool")
    architecture = Architecture(arch=arch)
    mean = torch.full((3,), 0.5)
    benign = architecture.build(CLASSES, 3, mean, mean / 2, rng=torch.Generator())
    save_model(work / "benign.safetensors", benign, architecture, pool.classes)
    inputs = {"pool": work / "data/pool", "benign": work / "benign.safetensors"}
    files = {"out": work / "poisoned", "report": work / "report"}
    options = {"size": max(1, side // 16)}
    with MemoryWatch() as watch:
        poison.main(["badnets", *flags(options | inputs | files)], standalone_mode=False)
    return watch.row(len(pool))


def train(work: Path, side: int, arch: str, steps: int, batch: int) -> dict[str, float]:
    import torch

    from rnp.attacks.base import backdoored_test_set
    from rnp.evaluation.metrics import EvaluationSets
    from rnp.io.datasets import load_images, load_poisoned
    from rnp.models.build import Architecture, statistics
    from rnp.training.augment import Augment
    from rnp.training.device import default_device
    from rnp.training.loop import cross_entropy, fit
    from rnp.training.malloc import keep_freed_pages
    from rnp.training.predict import EVAL_BATCH, eval_batches, predict
    from rnp.types import ImageSet, to_floats

    keep_freed_pages()
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (EVAL_BATCH, 3, side, side), dtype=torch.uint8, generator=rng)
    images = images[: max(batch, len(eval_batches(images)[0]))]
    labels = torch.arange(len(images)) % CLASSES
    random_set = ImageSet(images, labels, tuple(map(str, range(CLASSES))))
    model = Architecture(arch=arch).build_for(random_set, rng=rng).to(default_device())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)

    def run(data: ImageSet, number: int) -> None:
        fit(
            model.train(),
            data,
            objective=cross_entropy(model),
            optimizer=optimizer,
            epochs=number,
            max_steps=number,
            batch_size=batch,
            rng=rng,
            augment=Augment(),
            precision="auto",
        )

    run(random_set, 1)
    predict(model, images, precision="auto")
    del images, random_set
    with MemoryWatch() as watch:
        changes, options = load_poisoned(work / "poisoned")
        data = changes.apply(load_images(work / "data/pool"))
        mean, std = statistics(data)
        model.mean.copy_(mean.view_as(model.mean))
        model.std.copy_(std.view_as(model.std))
        start = time.perf_counter()
        run(data, steps)
        seconds = time.perf_counter() - start
        tests = load_images(work / "data/test")
        target = options["target_label"]
        triggered = backdoored_test_set(changes.trigger, tests, target)
        scores = EvaluationSets(tests, triggered, target).first(EVALUATED).score(model)
    augment = Augment()
    start = time.perf_counter()
    for positions in torch.randint(len(data), (GATHERED, batch), generator=rng):
        augment(to_floats(data.images.index_select(0, positions)), rng=rng)
    return watch.row(steps * batch) | {
        "input_images_per_second": GATHERED * batch / (time.perf_counter() - start),
        "step_images_per_second": steps * batch / seconds,
        "clean_accuracy": scores.clean_accuracy.value,
        "attack_success_rate": scores.attack_success_rate.value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("n", type=int, nargs="?", default=20_000)
    parser.add_argument("side", type=int, nargs="?", default=224)
    parser.add_argument("--steps", type=int, default=50, help="of training")
    parser.add_argument("--batch", type=int, default=16, help="images per step")
    parser.add_argument("--arch", default="torchvision:resnet18")
    parser.add_argument("--folder", type=Path, help="where the temporary folder goes")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    rows = measure(**options)
    print(json.dumps(rows, indent=2) if as_json else "\n".join(table(rows)))


if __name__ == "__main__":
    main()
