"""The stages of the pipeline, in their order, and what they cost."""

from __future__ import annotations

from collections.abc import Iterable

STAGES = (
    "prepare",
    "benign",
    "poison",
    "train",
    "unlearn",
    "recover",
    "prune",
    "defend",
    "detect",
    "controls",
    "evaluate",
    "report",
)
COSTS = ("seconds", "multiply_adds_forward", "multiply_adds_backward")
"""What run.json says about the cost of a stage; multiply-adds where the defender's images are."""
RNP_STAGES = ("unlearn", "recover", "prune")
"""Those whose seconds are the time of RNP."""
PER_IMAGE = "multiply_adds_per_image"
"""What the metrics of `unlearn` call the multiply-adds of a forward pass of one image."""


def passes(runs: Iterable[dict], per_image: int) -> str:
    """How many passes of an image have as many multiply-adds as these stages.

    It is empty where one of them was not counted.

    `runs` are their run.json. A backward pass has as many multiply-adds as two forward passes.
    """
    counts = [[run.get(name) for name in COSTS[1:]] for run in runs]
    if not per_image or any(None in count for count in counts):
        return ""
    forward, backward = map(sum, zip(*counts))
    return f"{forward / per_image:,.0f} forward, {backward / (2 * per_image):,.0f} backward"
