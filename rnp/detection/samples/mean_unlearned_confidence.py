"""A triggered image keeps its prediction all along the unlearning, a clean one only for a part of
the way.
"""

from __future__ import annotations

from dataclasses import dataclass

from rnp.detection.samples.unlearned_confidence import UnlearnedConfidence


@dataclass(frozen=True, kw_only=True)
class MeanUnlearnedConfidence(UnlearnedConfidence):
    """The score of `unlearned_confidence`, averaged over the checkpoints of the unlearning; which those are
    is up to who asks.

    A single checkpoint is a matter of luck: at a high accuracy clean images are still sure, after
    the collapse those of the backdoor's label are.

    Source: Li et al., ICML 2023, for the idea; the paper's exact score could not be read, this one
    is ours.
    """

    needs_ensemble = True
