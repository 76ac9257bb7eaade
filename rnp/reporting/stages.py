"""The stages of the pipeline, in their order."""

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
RNP_STAGES = ("unlearn", "recover", "prune")
"""Those whose seconds are the time of RNP."""
