"""Training steps on a GPU: plain, as a CUDA graph, compiled and as a CUDA graph.

`python -m benchmarks.steps TABLE` adds a row per way and batch size: images a second over 200
steps, and the seconds of the first ten, compiling and recording included. It trains ResNet-18 at
its published width on random images of CIFAR-10's size, augmented, and needs a GPU. `--summary`
prints the table.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.measure_training import noise, product_peak
from benchmarks.report import number, table
from rnp.io.files import read_rows, upsert_rows
from rnp.models.build import Architecture
from rnp.reporting.columns import format_row
from rnp.reporting.provenance import provenance
from rnp.training import loop
from rnp.training.augment import Augment
from rnp.training.loop import cross_entropy, fit, make_optimizer
from rnp.training.work import count_pass
from rnp.types import ImageSet

COLUMNS = (
    "way",
    "batch",
    "images_per_second",
    "teraflops",
    "peak_teraflops",
    "seconds_ten",
    "device",
    "torch",
)
KEY = ("way", "batch", "device", "torch")
WAYS = ("plain", "recorded", "compiled")
STEPS, FIRST = 200, 10


def measure(way: str, batch: int, data: ImageSet) -> dict[str, object]:
    model = Architecture().build_for(data, rng=torch.Generator().manual_seed(0)).cuda().train()
    optimizer = make_optimizer(
        torch.optim.SGD, model, lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    loop.WORTH_COMPILING = 0 if way == "compiled" else 10**9
    ends: list[float] = []

    def record(*_: object) -> None:
        if len(ends) + 1 in (FIRST, FIRST + STEPS):
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    start = time.perf_counter()
    fit(
        model,
        data,
        objective=cross_entropy(model),
        optimizer=optimizer,
        epochs=STEPS,
        max_steps=FIRST + STEPS,
        batch_size=batch,
        rng=torch.Generator().manual_seed(0),
        augment=Augment(),
        precision="auto",
        on_batch=record,
        cuda_graph=way != "plain",
    )
    rate = STEPS * batch / (ends[-1] - ends[FIRST - 1])
    return {
        "way": way,
        "batch": batch,
        "images_per_second": rate,
        "teraflops": 6 * count_pass(model, data.images) * rate / 1e12,
        "seconds_ten": ends[FIRST - 1] - start,
    }


def summary(rows: list[dict[str, str]]) -> list[str]:
    """A Markdown table of the rows.

    The operations are three multiply-adds per weight and place in forward and backward pass, two
    operations each; no other work counts.
    """
    columns = {
        "images a second": "images_per_second",
        "TFLOP/s": "teraflops",
        "seconds of the first ten steps": "seconds_ten",
    }
    body = [
        [
            row["way"],
            row["batch"],
            *(number(float(row[name])) for name in columns.values()),
            f"{float(row['teraflops']) / float(row['peak_teraflops']):.0%}",
        ]
        for row in rows
    ]
    return table(["way", "batch", *columns, "of the card's bf16 product peak"], body)[:-1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 512])
    parser.add_argument("--summary", action="store_true", help="print the table and run nothing")
    options = parser.parse_args()
    if options.summary:
        print("\n".join(summary(read_rows(options.table))))
        return
    if not torch.cuda.is_available():
        raise SystemExit("error: it needs a GPU")
    data, peak, where = noise(50_000), product_peak() / 1e12, provenance()
    for batch in options.batches:
        for way in WAYS:
            row = measure(way, batch, data) | {
                "peak_teraflops": peak,
                "device": where["device"],
                "torch": where["torch"],
            }
            upsert_rows(options.table, [format_row(row, COLUMNS)], COLUMNS, KEY)
            print(
                f"{way}, batches of {batch}: {row['images_per_second']:,.0f} images a second",
                flush=True,
            )


if __name__ == "__main__":
    main()
