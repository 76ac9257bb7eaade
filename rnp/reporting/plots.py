"""Figures: plain data in, one PNG out, the same bytes each time."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from rnp.io.files import read_rows
from rnp.prune import SweepPoint
from rnp.reporting.figures import (
    BLUE,
    COLORS,
    GRAY,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    SMALL,
    WIDTH,
    Ends,
    blank,
    canvas,
    mark,
    name_axes,
    name_lines,
    plain,
    save,
    show,
    whole_numbers,
)
from rnp.types import Epoch, Images, NeuronMask

MEASURES = {
    "clean_accuracy": ("CA", BLUE),
    "attack_success_rate": ("ASR", RED),
    "robust_accuracy": ("RA", GREEN),
}
TriggerImages = tuple[Float[Tensor, "c h w"], Float[Tensor, "h w"]]
"""Pattern and mask."""
Curve = tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray, float]
"""False positive rates, true positive rates, AUROC."""


def image_grid(path: Path, rows: Sequence[tuple[str, Float[Tensor, "_ c h w"]]]) -> None:
    """One strip of images per row, with its title on the left."""
    columns = max(len(images) for _, images in rows)
    side = (WIDTH - 1.2) / columns
    figure, axes = canvas(min(side, 1.6) * len(rows) + 0.1, len(rows), columns)
    for line, (title, images) in zip(axes, rows):
        for ax in line:
            blank(ax)
        for ax, image in zip(line, images):
            show(ax, image)
        style = {"rotation": 0, "ha": "right", "va": "center", "labelpad": 8, "parse_math": False}
        line[0].set_ylabel(textwrap.fill(title, 12), fontsize=10, color=INK, **style)
    save(figure, path)


def trigger_grid(
    path: Path, clean: Images, triggered: Images, stored: Images | None = None
) -> None:
    """The effect of the trigger; `stored` are the same images in the poisoned training set."""
    rows = [
        ("clean", clean),
        ("triggered", triggered),
        ("difference ×\u00a05", 5 * (triggered - clean).abs()),
    ]
    image_grid(path, rows if stored is None else [*rows, ("in the training set", stored)])


def columns_of(history: Path | Sequence[Epoch]) -> dict[str, np.ndarray]:
    """The columns of a history, from its CSV or from memory."""
    rows = read_rows(history) if isinstance(history, Path) else [epoch.row() for epoch in history]
    return {key: np.array([float(row[key]) for row in rows]) for key in (rows[0] if rows else ())}


def training_curves(path: Path, histories: dict[str, Path | Sequence[Epoch]]) -> None:
    """Loss and accuracy against epochs, one line per history."""
    figure, axes = canvas(2.9, 1, 2)
    tables = {name: columns_of(history) for name, history in histories.items()}
    drawn = [(name, table) for name, table in tables.items() if table]
    for ax, key in zip(axes[0], ("loss", "accuracy")):
        name_axes(ax, f"{key.capitalize()} on the seen batches", "epoch")
        ends = []
        for i, (name, table) in enumerate(drawn):
            color = COLORS[i % len(COLORS)]
            marker = "o" if len(table[key]) < 20 else ""
            ax.plot(table["epoch"], table[key], color=color, marker=marker, markersize=3.5)
            ends.append((table[key][-1], plain(name, 14), color))
        if key == "accuracy":
            ax.set_ylim(min(0.0, *ax.get_ylim()), 1.02)
        whole_numbers(ax)
        if len(tables) > 1:
            name_lines(ax, ends)
    save(figure, path)


def unlearning_curve(
    path: Path,
    trajectory: Sequence[Epoch],
    classes: Sequence[str],
    stop_step: int,
    target_label: int | None = None,
) -> None:
    """Accuracy and the class shares of the predictions against steps.

    The class with the largest share at the end is named. `target_label` is the attacker's, for a
    page that may know it; the defender has none.
    """
    steps = np.array([row.step for row in trajectory])
    shares = np.array(
        [[row.extra[f"share/{c}"] for c in range(len(classes))] for row in trajectory]
    )  # [steps, k]
    figure, axes = canvas(4.6, 2, 1, sharex=True, height_ratios=(1, 1.2))
    upper, lower = axes[:, 0]
    upper.plot(steps, [row.accuracy for row in trajectory], color=BLUE, linewidth=1.8)
    ends = plot_shares(lower, steps, shares, classes, target_label)
    for ax in (upper, lower):
        ax.set_ylim(-0.02, 1.02)
    whole_numbers(lower)
    mark(upper, stop_step, f"unlearned model: step {stop_step}", INK)
    lower.axvline(stop_step, color=INK, linestyle="--", linewidth=1.3)
    name_axes(upper, "Accuracy on the defense set", rows_above=1)
    title = "Share of predictions per class, among images of other classes"
    name_axes(lower, title, "step of the ascent")
    name_lines(lower, ends)
    save(figure, path)


def plot_shares(
    ax: Any, steps: np.ndarray, shares: np.ndarray, classes: Sequence[str], target_label: int | None
) -> Ends:
    """A line per class; the names of the largest one and of the target."""
    top = int(shares[-1].argmax())
    ax.plot(steps, shares, color="#bdbdbd", linewidth=0.9)
    ax.plot(steps, shares[:, top], color=ORANGE, linewidth=2.2)
    name = f"{plain(classes[top])}{' (target)' if top == target_label else ''}"
    ends = [(shares[-1, top], name, "#9a6700")]
    if target_label is not None and target_label != top:
        ax.plot(steps, shares[:, target_label], color=RED, linewidth=1.8, linestyle="--")
        ends.append((shares[-1, target_label], f"{plain(classes[target_label])} (target)", RED))
    return ends


def mask_histogram(path: Path, mask: NeuronMask, fraction: float = 0.05) -> None:
    """All masks as a histogram, and one tick per neuron for each layer in network order.

    `fraction` of the neurons, those with the lowest masks, are set off and counted per layer.
    """
    layers = {name: layer.detach().float().cpu().numpy() for name, layer in mask.items()}
    values = np.concatenate(list(layers.values()))
    bound = float(np.quantile(values, fraction, method="lower"))
    low = min(0.0, float(values.min()))
    high = max(1.0, float(values.max()))
    height = 0.2 * len(mask)
    figure, axes = canvas(2.3 + height, 2, 1, sharex=True, height_ratios=(1.2, max(height, 0.8)))
    upper, lower = axes[:, 0]
    upper.hist(values, bins=50, range=(low, high), log=True, color=BLUE)
    upper.set_ylim(bottom=0.7)  # a bar of one neuron shows
    margin = 0.02 * (high - low)
    upper.set_xlim(low - margin, high + margin)
    name_axes(upper, "Neurons per mask value (log scale)", rows_above=1)
    mark(upper, bound, f"lowest {fraction:.0%}: masks up to {bound:.3f}", RED)
    for y, layer in enumerate(layers.values()):
        plot_layer(lower, y, layer, bound)
    names = [plain(name, 26) for name in layers]
    lower.set_yticks(range(len(names)), names, fontsize=8, parse_math=False)
    lower.set_ylim(len(mask) - 0.4, -0.6)
    name_axes(lower, "Neurons by layer, in network order", "mask")
    lower.set_title(f"lowest {fraction:.0%}", loc="right", fontsize=SMALL, color=RED)
    save(figure, path)


def plot_layer(ax: Any, y: int, layer: np.ndarray, bound: float) -> None:
    """The ticks of a layer, and how many of them are within the bound."""
    lowest = layer <= bound
    rest = layer[~lowest]
    count = int(lowest.sum())
    ax.plot(rest, np.full(len(rest), y), "|", color=BLUE, markersize=7, markeredgewidth=0.7)
    ax.plot(layer[lowest], np.full(count, y), "|", color=RED, markersize=7, markeredgewidth=0.9)
    style = {"va": "center", "fontsize": 8, "transform": ax.get_yaxis_transform()}
    ax.text(1.01, y, f"{count} / {len(layer)}", color=RED if count else GRAY, **style)


def pruning_curve(
    path: Path, points: Sequence[dict], *, chosen: int, oracle: int | None = None, n: int
) -> None:
    """CA and ASR on test images against pruned neurons; `n` of the images are triggered.

    Points may have `defense_accuracy` too.
    """
    figure, axes = canvas(3.7)
    ax = axes[0, 0]
    ends = []
    pruned = [float(point["pruned"]) for point in points]
    lines = [
        ("clean_accuracy", *MEASURES["clean_accuracy"], "-"),
        ("defense_accuracy", "accuracy on\ndefense set", SKY, "-."),
        ("attack_success_rate", *MEASURES["attack_success_rate"], "-"),
    ]
    for key, name, color, style in lines:
        if key in points[0]:
            heights = [float(point[key]) for point in points]
            ax.plot(pruned, heights, color=color, linestyle=style, linewidth=2)
            ends.append((heights[-1], name, color))
    ax.set_ylim(-0.02, 1.02)
    ax.margins(x=0.02)
    whole_numbers(ax)
    mark(ax, chosen, f"chosen on the defense set: {chosen}", INK)
    if oracle is not None:
        text = f"oracle (unattainable for a defender): {oracle}"
        mark(ax, oracle, text, PURPLE, row=1, style=":")
    title = f"CA and ASR on test images ({n:,} of them triggered)"
    name_axes(ax, title, "pruned neurons", rows_above=2)
    name_lines(ax, ends)
    save(figure, path)


def sweep_curve(path: Path, points: Sequence[SweepPoint], chosen: SweepPoint) -> None:
    """What the defender sees: accuracy on the defense set and the paired drop."""
    figure, axes = canvas(4.2, 2, 1, sharex=True)
    pruned = [point.pruned for point in points]
    panels = (
        ("accuracy", "Accuracy on the defense set", BLUE),
        ("lost", "Paired drop: turned wrong − turned right, as a share", GREEN),
    )
    for ax, (key, title, color) in zip(axes[:, 0], panels):
        ax.plot(pruned, [getattr(point, key) for point in points], color=color, linewidth=2)
        ax.plot(chosen.pruned, getattr(chosen, key), "o", color=INK, markersize=6)
        ax.margins(x=0.02)
        name_axes(ax, title, rows_above=ax is axes[0, 0])
    upper, lower = axes[:, 0]
    whole_numbers(lower)
    text = f"chosen: {chosen.pruned} neurons, accuracy {chosen.accuracy:.3f}"
    mark(upper, chosen.pruned, text, INK)
    lower.axvline(chosen.pruned, color=INK, linestyle="--", linewidth=1.3)
    lower.axhline(0, color=GRAY, linewidth=0.8)
    lower.set_xlabel("pruned neurons", fontsize=10, color=INK)
    save(figure, path)


def recovered_triggers(
    path: Path,
    true_trigger: TriggerImages | None,
    recovered: Sequence[tuple[str, Float[Tensor, "c h w"], Float[Tensor, "h w"]]],
) -> None:
    """Pattern under its mask, and the mask, of the true trigger and of each recovered one.

    There is no true trigger where it is no patch.
    """
    items = [*([("true trigger", *true_trigger)] if true_trigger else []), *recovered]
    columns = min(max(len(items), 3), 5)
    blocks = -(-len(items) // columns)
    height = 2 * blocks * (WIDTH / columns + 0.05) * 0.95 + 0.3 * blocks
    figure, axes = canvas(height, 2 * blocks, columns)
    for ax in axes.flat:
        blank(ax)
    for i, (title, pattern, mask) in enumerate(items):
        row, column = divmod(i, columns)
        upper, lower = axes[2 * row, column], axes[2 * row + 1, column]
        show(upper, pattern * mask)
        show(lower, mask[None], cmap="viridis")
        text = textwrap.fill(plain(title, 44), 90 // columns)
        upper.set_title(text, fontsize=SMALL, color=INK, parse_math=False)
        if column == 0:
            upper.set_ylabel("pattern × mask", fontsize=SMALL, color=INK)
            lower.set_ylabel("mask, 0 to 1", fontsize=SMALL, color=INK)
    save(figure, path)


def roc(
    path: Path,
    curves: dict[str, Curve],
    positives: str = "triggered images",
    negatives: str = "clean images",
) -> None:
    """True against false positive rate of each detector, the best first."""
    figure, axes = canvas(4.0)
    ax = axes[0, 0]
    ax.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle=":")
    best_first = sorted(curves.items(), key=lambda item: -item[1][2])
    for i, (name, (fpr, tpr, auroc)) in enumerate(best_first):
        color = COLORS[i % len(COLORS)]
        style = ("-", "--", "-.")[(i + i // len(COLORS)) % 3]  # a new one when the colors repeat
        text = f"{auroc:.3f}  {plain(name)}".replace("$", r"\$")
        ax.plot(fpr, tpr, color=color, linestyle=style, linewidth=1.8, label=text)
    ax.set(xlim=(-0.01, 1), ylim=(0, 1.02), aspect="equal")
    mark(ax, 0.05, "5 % false alarms", GRAY)
    title = f"True positive rate ({positives} found)"
    name_axes(ax, title, f"false positive rate ({negatives} flagged)", rows_above=1)
    place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1)}
    legend = ax.legend(title="AUROC", frameon=False, fontsize=SMALL, handlelength=3, **place)
    legend._legend_box.align = "left"
    save(figure, path)


def before_after(path: Path, rows: Sequence[dict]) -> None:
    """CA, ASR and RA of each model as bars, in the given order.

    A row is {"model": name, "clean_accuracy": ..., ...}.
    """
    figure, axes = canvas(0.8 + 0.28 * len(rows), 1, len(MEASURES), sharey=True)
    heights = np.arange(len(rows))
    names = [
        f"{plain(row['model'])}{' (unattainable)' if row['model'] == 'oracle' else ''}"
        for row in rows
    ]
    for ax, (key, (title, color)) in zip(axes[0], MEASURES.items()):
        values = [float(row[key]) for row in rows]
        ax.barh(heights, np.nan_to_num(values), height=0.62, color=color)
        for y, value in zip(heights, values):
            text = f"{value:.3f}" if np.isfinite(value) else "–"
            ax.text(np.nan_to_num(value) + 0.03, y, text, va="center", fontsize=8, color=INK)
        ax.set(xlim=(0, 1.3), xticks=(0, 0.5, 1))
        ax.grid(False)
        ax.spines["left"].set_visible(False)
        ax.tick_params(axis="y", length=0)
        name_axes(ax, title)
    axes[0, 0].set_yticks(heights, names, parse_math=False)
    axes[0, 0].invert_yaxis()
    save(figure, path)
