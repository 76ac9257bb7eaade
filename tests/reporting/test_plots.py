"""Every figure: written completely or not at all, the same bytes each time, of a sane size, with
any names.
"""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from rnp.io.files import write_rows
from rnp.prune import SweepPoint
from rnp.reporting import figures, plots
from rnp.types import Epoch

HOSTILE = ("_hidden", "$\\frac{", "a\nb" * 40, "猫", "<b>", "")
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = {"bn1": torch.tensor([0.0, 0.5, 1.0]), "layer.$1": torch.ones(4)}
POINTS = [
    SweepPoint(
        pruned=n, threshold=n / 10, accuracy=0.9 - n / 50, loss=0.1, lost=n / 50, changed=n / 40
    )
    for n in range(5)
]
TESTED = [
    {"pruned": n, "clean_accuracy": 0.9, "attack_success_rate": 1 - n / 5, "defense_accuracy": 0.9}
    for n in range(5)
]


def epochs(n: int = 4, last_loss: float = 0.5) -> list[Epoch]:
    rest = {
        "learning_rate": 0.1,
        "gradient_norm": 1.0,
        "extra": {f"share/{c}": c / 15 for c in range(len(HOSTILE))},
    }
    return [
        Epoch(epoch=i, step=i, loss=last_loss if i == n else 1.0, accuracy=0.5, **rest)
        for i in range(1, n + 1)
    ]


FIGURES = {
    "images": partial(plots.image_grid, rows=[(name, IMAGES) for name in HOSTILE]),
    "images of unequal number, gray": partial(
        plots.image_grid, rows=[("a", IMAGES[:, :1]), ("b", IMAGES[:1, :1])]
    ),
    "trigger": partial(plots.trigger_grid, clean=IMAGES, triggered=1 - IMAGES),
    "trigger, stored": partial(
        plots.trigger_grid, clean=IMAGES, triggered=1 - IMAGES, stored=IMAGES
    ),
    "training": partial(plots.training_curves, histories=dict.fromkeys(HOSTILE, epochs())),
    "training, NaN": partial(
        plots.training_curves, histories={"a": epochs(last_loss=math.nan), "b": epochs()}
    ),
    "unlearning": partial(
        plots.unlearning_curve, trajectory=epochs(), classes=HOSTILE, stop_step=2
    ),
    "unlearning, one step": partial(
        plots.unlearning_curve, trajectory=epochs(1), classes=HOSTILE, stop_step=1, target_label=1
    ),
    "masks": partial(plots.mask_histogram, mask=MASK),
    "masks, all equal": partial(plots.mask_histogram, mask={"bn": torch.ones(1)}),
    "pruning": partial(plots.pruning_curve, points=TESTED, chosen=1, oracle=4, n=10),
    "pruning, one point": partial(plots.pruning_curve, points=TESTED[:1], chosen=0, n=10),
    "sweep": partial(plots.sweep_curve, points=POINTS, chosen=POINTS[2]),
    "sweep, one point": partial(plots.sweep_curve, points=POINTS[:1], chosen=POINTS[0]),
    "triggers": partial(
        plots.recovered_triggers,
        true_trigger=(IMAGES[0], IMAGES[0, 0]),
        recovered=[(name, IMAGES[1], IMAGES[1, 1]) for name in HOSTILE],
    ),
    "triggers, one": partial(
        plots.recovered_triggers, true_trigger=None, recovered=[("a", IMAGES[1], IMAGES[1, 1])]
    ),
    "roc": partial(
        plots.roc, curves={name: ([0.0, 0.1, 1.0], [0.0, 0.8, 1.0], 0.9) for name in HOSTILE}
    ),
    "models": partial(
        plots.before_after,
        rows=[
            {
                "model": name,
                "clean_accuracy": 0.9,
                "attack_success_rate": math.nan,
                "robust_accuracy": 0.0,
            }
            for name in (*HOSTILE, "oracle")
        ],
    ),
}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_figure_is_written_and_repeats_byte_for_byte(draw: partial, tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw(tmp_path / "new" / name)
    one, two = (tmp_path / "new" / name for name in ("one.png", "two.png"))
    assert one.read_bytes() == two.read_bytes()
    with Image.open(one) as picture:
        assert (
            picture.width == figures.WIDTH * figures.DPI
            and 200 < picture.height < 4 * picture.width
        )
        assert (
            len(picture.convert("L").histogram()) > 1 and picture.convert("L").getextrema()[0] < 128
        )


def test_nothing_is_left_when_the_write_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sweep.png"
    path.write_bytes(b"earlier")

    def fail(self: Figure, draft: Path, **_: object) -> None:
        draft.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.sweep_curve(path, POINTS, POINTS[0])
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"earlier"]


def test_histories_from_memory_and_from_csv_look_alike(tmp_path: Path) -> None:
    write_rows(tmp_path / "history.csv", [epoch.row() for epoch in epochs()])
    plots.training_curves(tmp_path / "csv.png", {"train": tmp_path / "history.csv"})
    plots.training_curves(tmp_path / "memory.png", {"train": epochs()})
    assert (tmp_path / "csv.png").read_bytes() == (tmp_path / "memory.png").read_bytes()


def test_names_of_lines_are_kept_apart_and_inside() -> None:
    _, axes = figures.canvas(3.0)
    ax = axes[0, 0]
    ax.set_ylim(0, 1)
    figures.name_lines(
        ax,
        [
            (0.99, "a", "k"),
            (0.98, "b", "k"),
            (1.0, "c", "k"),
            (0.1, "d", "k"),
            (math.nan, "e", "k"),
        ],
        gap=0.1,
    )
    heights = {text.get_text(): text.get_position()[1] for text in ax.texts}
    assert heights == pytest.approx({"d": 0.1, "b": 0.8, "a": 0.9, "c": 1.0})


def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, rnp.reporting.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
