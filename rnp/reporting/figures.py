"""The parts of all figures; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from rnp.io.files import atomic_write

BLUE = "#0072B2"
RED = "#D55E00"
GREEN = "#009E73"
PURPLE = "#AA4499"
ORANGE = "#E69F00"
SKY = "#56B4E9"
COLORS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
"""Distinct for color-blind eyes (after Okabe and Ito, 2008)."""
INK = "#222222"
GRAY = "#767676"
WIDTH = 6.4  # inches
DPI = 200  # 10 pt are 15 pixels then, at a width of 700
SMALL = 9
Ends = list[tuple[float, str, str]]
"""Height of a line's right end, its name, its color."""


def canvas(height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Any, np.ndarray]:
    """A figure of the common width and its axes [rows, columns].

    Without pyplot there is no state that outlives the call.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GRAY)
        ax.tick_params(colors=INK, labelsize=SMALL, color=GRAY)
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    """Write a PNG, the same bytes each time; class names may be in any script."""
    with atomic_write(path) as draft, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(draft, format="png", metadata={"Software": None})


def name_axes(ax: Any, title: str, x: str = "", *, rows_above: int = 0) -> None:
    """A title in place of a rotated y label; `rows_above` leaves room for the names of marks."""
    ax.set_title(title, loc="left", fontsize=10, color=INK, pad=6 + 13 * rows_above)
    ax.set_xlabel(x, fontsize=10, color=INK)


def plain(name: object, width: int = 22) -> str:
    """A name from outside, on one line and not too long."""
    text = " ".join(str(name).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def name_lines(ax: Any, ends: Ends, gap: float = 0.08) -> None:
    """Write each name at the right end of its line, `gap` of the height of the axes apart."""
    ends = sorted(end for end in ends if np.isfinite(end[0]))
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [to_axes.transform((ax.get_xlim()[1], y))[1] for y, _, _ in ends]
    for i in range(1, len(ends)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(ends))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    style = {"fontsize": SMALL, "va": "center", "transform": ax.transAxes, "parse_math": False}
    for height, (_, name, color) in zip(heights, ends):
        ax.text(1.02, height, name, color=color, **style)


def mark(
    ax: Any, x: int | float, text: str, color: str, *, row: int = 0, style: str = "--"
) -> None:
    """A vertical line, named above the axes, where no curve crosses the words."""
    ax.axvline(x, color=color, linestyle=style, linewidth=1.3)
    low, high = ax.get_xlim()
    ax.annotate(
        text,
        (x, 1),
        (0, 4 + 13 * row),
        xycoords=ax.get_xaxis_transform(),
        textcoords="offset points",
        color=color,
        fontsize=SMALL,
        ha="left" if x < (low + high) / 2 else "right",
    )


def whole_numbers(ax: Any) -> None:
    """Ticks for counts, also when there is only one point."""
    from matplotlib.ticker import MaxNLocator

    low, high = ax.get_xlim()
    ax.set_xlim(low, max(high, low + 1))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def show(ax: Any, image: Float[Tensor, "c h w"], **options: Any) -> None:
    """An image without axes; what is not RGB is shown as its mean over the channels."""
    pixels = image.detach().cpu().clamp(0, 1)
    pixels = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels.mean(0)
    ax.imshow(pixels.numpy(), **{"cmap": "gray", "vmin": 0, "vmax": 1, **options})
    blank(ax)


def blank(ax: Any) -> None:
    """Hide the axes."""
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
