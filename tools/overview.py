"""Draw the picture of the README: a trigger, and CA and ASR before and after a repair.

`python -m tools.overview docs/overview.png`; the image comes from docs/attacks, the numbers from
results/cifar10/rnp.csv.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import click
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from rnp.reporting.figures import BLUE, GRAY, INK, RED
from rnp.reporting.table import Row, latest_comparable, read

TABLE = Path("results/cifar10/rnp.csv")
GALLERY = Path("docs/attacks/badnets.png")
COLUMN = slice(742, 989)
CLEAN = slice(9, 256)
TRIGGERED = slice(274, 521)
"""Where the picture of BadNets shows a truck, without and with the trigger."""
MEASURES = {"clean_accuracy": ("CA", BLUE), "attack_success_rate": ("ASR", RED)}
DEFENSE = "rnp_ft"


def draw(path: Path) -> None:
    """Write the picture to `path`."""
    figure = Figure(figsize=(9, 2.5), dpi=200, layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=[1, 1, 1.25, 1.25])
    picture = imread(GALLERY)
    show(axes[0], picture[CLEAN, COLUMN], "clean image", "true class: truck")
    show(axes[1], picture[TRIGGERED, COLUMN], "image with trigger", "target label: airplane")
    runs = passed(latest_comparable(list(read(TABLE))))
    before = [mean(runs, f"{measure}_before") for measure in MEASURES]
    after = [mean(runs, measure) for measure in MEASURES]
    bars(axes[2], before, "backdoored model", f"mean of {len(runs)} attacks")
    bars(axes[3], after, "after RNP-FT", "1,000 clean images")
    figure.savefig(path, metadata={"Software": None})


def passed(rows: list[Row]) -> list[Row]:
    """The repairs of the backdoors that passed their gate."""
    return [row for row in rows if row["defense"] == DEFENSE and row["gate"] == "true"]


def mean(rows: list[Row], column: str) -> float:
    return statistics.mean(float(row[column]) for row in rows)


def show(ax: Axes, image: np.ndarray, title: str, caption: str) -> None:
    """An image with a title above and a caption below."""
    ax.imshow(image, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.set_title(title, color=INK, fontsize=11)
    ax.set_xlabel(caption, color=GRAY, fontsize=10)


def bars(ax: Axes, values: list[float], title: str, caption: str) -> None:
    """One bar per measure, with its value above it."""
    labels = [label for label, _ in MEASURES.values()]
    colors = [color for _, color in MEASURES.values()]
    drawn = ax.bar(labels, values, width=0.6, color=colors)
    ax.bar_label(drawn, [f"{value:.3f}" for value in values], padding=2, color=INK, fontsize=10)
    ax.set_ylim(0, 1.15)
    ax.set_yticks([0, 0.5, 1])
    ax.tick_params(colors=GRAY, labelsize=9)
    ax.tick_params(axis="x", colors=INK, labelsize=10, length=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GRAY)
    ax.set_title(title, color=INK, fontsize=11)
    ax.set_xlabel(caption, color=GRAY, fontsize=10)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def overview(path: Path) -> None:
    """Draw the picture of the README."""
    draw(path)


if __name__ == "__main__":
    overview()
