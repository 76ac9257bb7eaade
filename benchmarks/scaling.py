"""How cost grows: the exponents of power laws, and their picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

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
    """By axis and phase what grows and the median seconds; the number of neurons tried concerns
    pruning alone.
    """
    found: Points = {}
    for name in runs:
        axis, value, *phase = name.split("/")
        if axis == "subject" or (axis == "max_fraction" and phase != ["prune"]):
            continue
        x = median(runs, name, "tried") if axis == "max_fraction" else float(value)
        seconds = median(runs, name, PHASES[phase[0]][0])
        if seconds is not None:
            found.setdefault("tried" if axis == "max_fraction" else axis, {}).setdefault(
                phase[0], []
            ).append((x, seconds))
    return found


def exponents(runs: Runs) -> dict[str, dict[str, float | None]]:
    """None where there are too few points."""
    fits = {
        axis: {phase: exponent(*zip(*some)) for phase, some in phases.items()}
        for axis, phases in points(runs).items()
    }
    return {
        axis: {phase: fit if math.isfinite(fit) else None for phase, fit in phases.items()}
        for axis, phases in fits.items()
    }


def draw(path: Path, part: dict) -> None:
    """Seconds against each thing that grows, both on logarithmic scales; the exponent stands at
    the end of each line.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure, axes = canvas(5.4, 2, 2)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for ax, (axis, title) in zip(axes.flat, AXES.items()):
        ends, at = [], set()
        for phase, some in points(part["runs"]).get(axis, {}).items():
            _, name, color = PHASES[phase]
            x, y = zip(*sorted(some))
            ax.plot(x, y, color=color, marker="o", markersize=3.5, linewidth=1.8)
            fit = part["exponents"][axis][phase]
            ends.append(
                (
                    y[-1],
                    f"{name}\n{'' if fit is None else f'exponent {round(fit, 2) + 0.0:.2f}'}",
                    color,
                )
            )
            at |= set(x)
        ax.set(xscale="log", yscale="log")
        ax.margins(y=0.15)
        ax.set_xticks(sorted(at))
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
