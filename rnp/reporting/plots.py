"""Figures: plain data in, one PNG out, the same bytes each time; matplotlib is imported when the
first one is drawn.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from rnp.io.files import atomic_write, read_rows
from rnp.prune import SweepPoint
from rnp.types import Epoch, Images, NeuronMask

COLORS = BLUE, RED, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#AA4499",
    "#E69F00",
    "#56B4E9",
)
"""Told apart by color-blind eyes (after Okabe and Ito, 2008)."""
INK, GRAY = "#222222", "#767676"
MEASURES = {
    "clean_accuracy": ("CA", BLUE),
    "attack_success_rate": ("ASR", RED),
    "robust_accuracy": ("RA", GREEN),
}
WIDTH, DPI = 6.4, 200  # inches; 10 pt then are 15 pixels at a width of 700
SMALL = 9
Ends = list[tuple[float, str, str]]
"""Height of a line's right end, its name, its color."""


def canvas(height: float, rows: int = 1, columns: int = 1, **grid: Any) -> tuple[Any, np.ndarray]:
    """A figure of the common width and its axes [rows, columns]; no pyplot, hence no state that
    outlives the call.
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
    with atomic_write(path) as draft, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing", UserWarning
        )  # class names may be in any script
        figure.savefig(draft, format="png", metadata={"Software": None})


def name_axes(ax: Any, title: str, x: str = "", *, rows_above: int = 0) -> None:
    """The title stands where a rotated y label would be hard to read; `rows_above` leaves room for
    marks.
    """
    ax.set_title(title, loc="left", fontsize=10, color=INK, pad=6 + 13 * rows_above)
    ax.set_xlabel(x, fontsize=10, color=INK)


def plain(name: object, width: int = 22) -> str:
    """A name from outside, in one line and not too long."""
    text = " ".join(str(name).split())
    return text if len(text) <= width else f"{text[: width - 1]}…"


def name_lines(ax: Any, ends: Ends, gap: float = 0.08) -> None:
    """Write each name at the right end of its line, moved apart to at least `gap` of the height of
    the axes.
    """
    ends = sorted(end for end in ends if np.isfinite(end[0]))
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [to_axes.transform((ax.get_xlim()[1], y))[1] for y, _, _ in ends]
    for i in range(1, len(ends)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    ceiling = 1.0
    for i in reversed(range(len(ends))):
        heights[i] = min(heights[i], ceiling)
        ceiling = heights[i] - gap
    for height, (_, name, color) in zip(heights, ends):
        ax.text(
            1.02,
            height,
            name,
            color=color,
            fontsize=SMALL,
            va="center",
            transform=ax.transAxes,
            parse_math=False,
        )


def mark(
    ax: Any, x: int | float, text: str, color: str, *, row: int = 0, style: str = "--"
) -> None:
    """A vertical line, named above the axes, where no curve can run through the words."""
    ax.axvline(x, color=color, linestyle=style, linewidth=1.3)
    low, high = ax.get_xlim()
    side = "left" if x < (low + high) / 2 else "right"
    ax.annotate(
        text,
        (x, 1),
        (0, 4 + 13 * row),
        xycoords=ax.get_xaxis_transform(),
        textcoords="offset points",
        color=color,
        fontsize=SMALL,
        ha=side,
    )


def whole_numbers(ax: Any) -> None:
    """Ticks for counts, also when there is but one point."""
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
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


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
        line[0].set_ylabel(
            textwrap.fill(title, 12),
            rotation=0,
            ha="right",
            va="center",
            labelpad=8,
            fontsize=10,
            color=INK,
            parse_math=False,
        )
    save(figure, path)


def trigger_grid(
    path: Path, clean: Images, triggered: Images, stored: Images | None = None
) -> None:
    """What the trigger does; `stored` is what the poisoned training set holds for the same
    images.
    """
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
    for ax, key in zip(axes[0], ("loss", "accuracy")):
        name_axes(ax, f"{key.capitalize()} on the seen batches", "epoch")
        ends = []
        for i, (name, table) in enumerate((n, t) for n, t in tables.items() if t):
            color = COLORS[i % len(COLORS)]
            ax.plot(
                table["epoch"],
                table[key],
                color=color,
                marker="o" if len(table[key]) < 20 else "",
                markersize=3.5,
            )
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
    """Accuracy and the class shares of the predictions against steps; the class that wins at the
    end is named.

    `target_label` is the attacker's, for a page that may know it; the defender has none.
    """
    steps = np.array([row.step for row in trajectory])
    shares = np.array(
        [[row.extra[f"share/{c}"] for c in range(len(classes))] for row in trajectory]
    )  # [steps, k]
    top = int(shares[-1].argmax())
    figure, axes = canvas(4.6, 2, 1, sharex=True, height_ratios=(1, 1.2))
    upper, lower = axes[:, 0]
    upper.plot(steps, [row.accuracy for row in trajectory], color=BLUE, linewidth=1.8)
    lower.plot(steps, shares, color="#bdbdbd", linewidth=0.9)
    lower.plot(steps, shares[:, top], color=ORANGE, linewidth=2.2)
    ends = [
        (
            shares[-1, top],
            f"{plain(classes[top])}{' (target)' if top == target_label else ''}",
            "#9a6700",
        )
    ]
    if target_label not in (None, top):
        lower.plot(steps, shares[:, target_label], color=RED, linewidth=1.8, linestyle="--")
        ends.append((shares[-1, target_label], f"{plain(classes[target_label])} (target)", RED))
    for ax in (upper, lower):
        ax.set_ylim(-0.02, 1.02)
    whole_numbers(lower)
    mark(upper, stop_step, f"unlearned model: step {stop_step}", INK)
    lower.axvline(stop_step, color=INK, linestyle="--", linewidth=1.3)
    name_axes(upper, "Accuracy on the defense set", rows_above=1)
    name_axes(
        lower, "Share of predictions per class, among images of other classes", "step of the ascent"
    )
    name_lines(lower, ends)
    save(figure, path)


def mask_histogram(path: Path, mask: NeuronMask, fraction: float = 0.05) -> None:
    """All masks as a histogram, and one tick per neuron for each layer in network order.

    `fraction` of the neurons, those with the lowest masks, are set off and counted per layer.
    """
    values = torch.cat(list(mask.values())).detach().float().cpu().numpy()
    bound = float(np.quantile(values, fraction, method="lower"))
    low, high = min(0.0, float(values.min())), max(1.0, float(values.max()))
    figure, axes = canvas(
        2.3 + 0.2 * len(mask), 2, 1, sharex=True, height_ratios=(1.2, max(0.2 * len(mask), 0.8))
    )
    upper, lower = axes[:, 0]
    upper.hist(values, bins=50, range=(low, high), log=True, color=BLUE)
    upper.set_ylim(bottom=0.7)  # a bar of one neuron shows
    margin = 0.02 * (high - low)
    upper.set_xlim(low - margin, high + margin)
    name_axes(upper, "Neurons per mask value (log scale)", rows_above=1)
    mark(upper, bound, f"lowest {fraction:.0%}: masks up to {bound:.3f}", RED)
    for y, layer in enumerate(mask.values()):
        layer = layer.detach().float().cpu().numpy()
        few = layer <= bound
        lower.plot(
            layer[~few],
            np.full((~few).sum(), y),
            "|",
            color=BLUE,
            markersize=7,
            markeredgewidth=0.7,
        )
        lower.plot(
            layer[few], np.full(few.sum(), y), "|", color=RED, markersize=7, markeredgewidth=0.9
        )
        lower.text(
            1.01,
            y,
            f"{few.sum()} / {len(layer)}",
            va="center",
            fontsize=8,
            color=RED if few.any() else GRAY,
            transform=lower.get_yaxis_transform(),
        )
    lower.set_yticks(
        range(len(mask)), [plain(name, 26) for name in mask], fontsize=8, parse_math=False
    )
    lower.set_ylim(len(mask) - 0.4, -0.6)
    name_axes(lower, "Neurons by layer, in network order", "mask")
    lower.set_title(f"lowest {fraction:.0%}", loc="right", fontsize=SMALL, color=RED)
    save(figure, path)


def pruning_curve(
    path: Path, points: Sequence[dict], *, chosen: int, oracle: int | None = None, n: int
) -> None:
    """CA and ASR on test images, `n` of them triggered, against pruned neurons; `defense_accuracy`
    if the points have it.
    """
    figure, axes = canvas(3.7)
    ax, ends = axes[0, 0], []
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
        mark(
            ax, oracle, f"oracle (unattainable for a defender): {oracle}", PURPLE, row=1, style=":"
        )
    name_axes(
        ax, f"CA and ASR on test images ({n:,} of them triggered)", "pruned neurons", rows_above=2
    )
    name_lines(ax, ends)
    save(figure, path)


def sweep_curve(path: Path, points: Sequence[SweepPoint], chosen: SweepPoint) -> None:
    """What the defender sees: accuracy on the defense set and the paired drop against pruned
    neurons.
    """
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
    mark(
        upper,
        chosen.pruned,
        f"chosen: {chosen.pruned} neurons, accuracy {chosen.accuracy:.3f}",
        INK,
    )
    lower.axvline(chosen.pruned, color=INK, linestyle="--", linewidth=1.3)
    lower.axhline(0, color=GRAY, linewidth=0.8)
    lower.set_xlabel("pruned neurons", fontsize=10, color=INK)
    save(figure, path)


def recovered_triggers(
    path: Path,
    truth: tuple[Float[Tensor, "c h w"], Float[Tensor, "h w"]] | None,
    recovered: Sequence[tuple[str, Float[Tensor, "c h w"], Float[Tensor, "h w"]]],
) -> None:
    """Pattern under its mask, and the mask, of the true trigger (None when it is no patch) and of
    each recovered one.
    """
    items = [*([("true trigger", *truth)] if truth else []), *recovered]
    columns = min(max(len(items), 3), 5)
    blocks = -(-len(items) // columns)
    figure, axes = canvas(
        2 * blocks * (WIDTH / columns + 0.05) * 0.95 + 0.3 * blocks, 2 * blocks, columns
    )
    for ax in axes.flat:
        blank(ax)
    for i, (title, pattern, mask) in enumerate(items):
        row, column = divmod(i, columns)
        upper, lower = axes[2 * row, column], axes[2 * row + 1, column]
        show(upper, pattern * mask)
        show(lower, mask[None], cmap="viridis")
        upper.set_title(
            textwrap.fill(plain(title, 44), 90 // columns),
            fontsize=SMALL,
            color=INK,
            parse_math=False,
        )
        if column == 0:
            for ax, what in ((upper, "pattern × mask"), (lower, "mask, 0 to 1")):
                ax.set_ylabel(what, fontsize=SMALL, color=INK)
    save(figure, path)


def roc(
    path: Path,
    curves: dict[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray, float]],
    positives: str = "triggered images",
    negatives: str = "clean images",
) -> None:
    """True against false positive rate of each detector, the best first: name -> (fpr, tpr,
    AUROC).
    """
    figure, axes = canvas(4.0)
    ax = axes[0, 0]
    ax.plot([0, 1], [0, 1], color=GRAY, linewidth=1, linestyle=":")
    for i, (name, (fpr, tpr, auroc)) in enumerate(
        sorted(curves.items(), key=lambda item: -item[1][2])
    ):
        style = ("-", "--", "-.")[
            (i + i // len(COLORS)) % 3
        ]  # another one when the colors begin again
        ax.plot(
            fpr,
            tpr,
            color=COLORS[i % len(COLORS)],
            linestyle=style,
            linewidth=1.8,
            label=f"{auroc:.3f}  {plain(name)}".replace("$", r"\$"),
        )
    ax.set(xlim=(-0.01, 1), ylim=(0, 1.02), aspect="equal")
    mark(ax, 0.05, "5 % false alarms", GRAY)
    name_axes(
        ax,
        f"True positive rate ({positives} found)",
        f"false positive rate ({negatives} flagged)",
        rows_above=1,
    )
    legend = ax.legend(
        title="AUROC",
        loc="upper left",
        bbox_to_anchor=(1.02, 1),
        frameon=False,
        fontsize=SMALL,
        handlelength=3,
    )
    legend._legend_box.align = "left"
    save(figure, path)


def before_after(path: Path, rows: Sequence[dict]) -> None:
    """CA, ASR and RA of each model as bars: {"model": name, "clean_accuracy": ..., ...}, drawn in
    the given order.
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
