"""How often label detectors accuse benign models."""

FALSE_ALARMS = {
    "consensus": (0, 21),
    "latent_trigger": (0, 21),
    "trigger_size": (1, 30),
    "unanimity": (0, 21),
}
"""The benign models that a detector accuses, and those that it judges, of many recipes.

Counted by `python -m experiments.recipes`; results/demo/recipes.csv has the rows.
"""


def false_alarms(detector: str) -> str | None:
    """The count in words; None for a detector that was not counted."""
    if detector not in FALSE_ALARMS:
        return None
    accused, judged = FALSE_ALARMS[detector]
    return f"{accused} of {judged} benign models"
