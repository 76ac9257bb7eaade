"""How cost grows: the exponents of power laws, and their picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subprocesses import Runs, median
from rnp.reporting.figures import (
    BLUE,
    GRAY,
    GREEN,
    RED,
    SMALL,
    canvas,
    name_axes,
    name_lines,
    save,
)

AXES = {
    "images": "clean images (each half)",
    "width": "channels of the first stage",
    "tried": "neurons tried",
    "side": "side of the images, pixels",
}
PHASES = {
    "unlearn": ("seconds_per_step", "unlearn, a step", BLUE),
    "recover": ("seconds", "recover", GREEN),
    "prune": ("seconds", "prune", RED),
}
Points = dict[str, dict[str, list[tuple[float, float]]]]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """b of the power law y = a x^b, by least squares in logarithms; NaN for fewer than two
    different x.
    """
    if len(set(x)) < 2:
        return math.nan
    return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 4) + 0.0  # no -0


def points(runs: Runs) -> Points:
    """By axis and phase the sizes and the median seconds.

    The number of neurons tried concerns pruning alone.
    """
    by_axis: Points = {}
    for name in runs:
        axis, value, *phase = name.split("/")
        if axis == "subject" or (axis == "max_fraction" and phase != ["prune"]):
            continue
        x = median(runs, name, "tried") if axis == "max_fraction" else float(value)
        seconds = median(runs, name, PHASES[phase[0]][0])
        if x is not None and seconds is not None:
            phases = by_axis.setdefault("tried" if axis == "max_fraction" else axis, {})
            phases.setdefault(phase[0], []).append((x, seconds))
    return by_axis


def exponents(runs: Runs) -> dict[str, dict[str, float | None]]:
    """None where there are too few points."""
    fits = {
        axis: {phase: exponent(*zip(*pairs)) for phase, pairs in phases.items()}
        for axis, phases in points(runs).items()
    }
    return {
        axis: {phase: fit if math.isfinite(fit) else None for phase, fit in phases.items()}
        for axis, phases in fits.items()
    }


def draw(path: Path, part: dict) -> None:
    """Seconds against each size, both on logarithmic scales; the exponents are beside the lines."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure, axes = canvas(5.4, 2, 2)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    by_axis = points(part["runs"])
    for ax, (axis, title) in zip(axes.flat, AXES.items()):
        phases = by_axis.get(axis, {})
        ends = [
            plot_phase(ax, phase, pairs, part["exponents"][axis][phase])
            for phase, pairs in phases.items()
        ]
        ax.set(xscale="log", yscale="log")
        ax.margins(y=0.15)
        ax.set_xticks(sorted({x for pairs in phases.values() for x, _ in pairs}))
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(plain)
        ax.yaxis.set_major_formatter(plain)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(axis="x", color="#e4e4e4", linewidth=0.8)
        name_axes(ax, "seconds", title)
        name_lines(ax, ends, gap=0.2)
    figure.supxlabel(part["machine"]["name"], x=0.01, ha="left", fontsize=SMALL, color=GRAY)
    save(figure, path)


def plot_phase(
    ax: Any, phase: str, pairs: list[tuple[float, float]], fit: float | None
) -> tuple[float, str, str]:
    """Draw the line of a phase; its end, its name with the exponent, its color."""
    _, name, color = PHASES[phase]
    x, y = zip(*sorted(pairs))
    ax.plot(x, y, color=color, marker="o", markersize=3.5, linewidth=1.8)
    text = "" if fit is None else f"exponent {round(fit, 2) + 0.0:.2f}"
    return y[-1], f"{name}\n{text}", color
