"""RNP, and a short tuning against the triggers that can be recovered: each removes what the other does not see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from rnp.defences.base import Repaired
from rnp.defences.nc_unlearn import NCUnlearn
from rnp.detection.base import RecoveredTrigger
from rnp.errors import UserError
from rnp.prune import Prune
from rnp.recover import Recover
from rnp.types import DefenceSet, ImageSet, OnEpoch, ignore
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class Guided(NCUnlearn):
    """Where a label of the given model has an abnormally small trigger, the pruned model is tuned against it.

    Tuning hides a trigger before it removes what lies behind: each further round recovers what the tuned model still
    answers to, and tunes against all that was found. The learning rate is a tenth of a fine-tuning's, so that clean
    accuracy, and the neurons that were pruned, stay what they are. Where no label stands out this is RNP and no more.

    Drawn at random: what recovering triggers, unlearning, recovery of the masks and tuning draw.

    Source: Li et al., ICML 2023, for the pruning; Wang et al., S&P 2019, sections IV and VI.C, for the search, the suspicion
    and the tuning against what was found. Their union and the rounds are ours.
    """

    unlearn: Unlearn = Unlearn()
    recover: Recover = Recover()
    prune: Prune = Prune()
    lr: Annotated[float, "learning rate of the tuning at the start of each round"] = 0.001
    steps: Annotated[int, "optimiser steps of a round"] = 100
    stamped: Annotated[float, "share of the images that carry a trigger in the tuning"] = 0.3
    rounds: Annotated[int, "times that triggers are recovered and tuned against"] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 1:
            raise UserError(f"{self.name}.rounds must be at least 1, got {self.rounds}")

    def repair(self, model: nn.Module, defence_set: DefenceSet, *, rng: torch.Generator, on_epoch: OnEpoch = ignore) -> Repaired:
        clean = defence_set.train
        triggers = self.suspicious(self.search.recover(model, clean, rng=rng))
        unlearned = self.unlearn(model, clean, rng=rng, on_epoch=on_epoch).model
        mask = self.recover(unlearned, clean, rng=rng, on_epoch=on_epoch).mask
        repaired = self.prune(model, mask, defence_set.both).model
        return Repaired(self.shut(triggers, repaired, clean, rng=rng, on_epoch=on_epoch))

    def shut(self, triggers: list[RecoveredTrigger], repaired: nn.Module, clean: ImageSet, *, rng: torch.Generator,
             on_epoch: OnEpoch = ignore) -> nn.Module:
        """Change the pruned model in place and return it, so that neither `triggers` nor what comes after them moves it."""
        found, labels = list(triggers), [trigger.label for trigger in triggers]
        for number in range(self.rounds if labels else 0):
            if number:
                found += self.search.recover_for(labels, repaired, clean, rng=rng)
            self.tune_against(found, repaired, clean, rng=rng, on_epoch=on_epoch)
        return repaired
