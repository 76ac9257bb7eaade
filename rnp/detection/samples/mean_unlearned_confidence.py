"""A triggered image keeps its prediction throughout the unlearning, a clean image does not."""

from __future__ import annotations

from dataclasses import dataclass

from rnp.detection.samples.unlearned_confidence import UnlearnedConfidence


@dataclass(frozen=True, kw_only=True)
class MeanUnlearnedConfidence(UnlearnedConfidence):
    """The score of `unlearned_confidence`, averaged over the checkpoints of the unlearning.

    A single checkpoint may be too early or too late: at a high accuracy the confidence in clean
    images is still high, and after the collapse that in clean images of the backdoor's label is.

    Drawn at random: nothing.

    Source: Li et al., ICML 2023, for the idea; the paper's exact score was not available, this one
    is ours.
    """

    needs_ensemble = True
