"""FT with the unlearned model: the weights that unlearning changed most start from zero."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from torch import nn

from rnp.defenses.base import Repaired
from rnp.defenses.ft import FT
from rnp.models.features import head
from rnp.types import DefenseSet, OnEpoch, no_callback
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class FTUnlearned(FT):
    """Fine-tuning from a start in which the channels that unlearning changed most have lost the
    weights that changed most.

    A channel is a row of the kernel of a convolution or linear layer, the classifier at the end
    apart; its change is the sum of the absolute changes of its weights. The fine-tuning draws what
    it draws in `ft`.

    Source: Lin et al., NeurIPS 2024 (TSBD), arXiv 2405.20291: both stages, with its .7 of the
    weights.
    Differs: unlearns as RNP does; the fine-tuning is that of `ft`, without a penalty on the norm
    of the gradient; the share of the channels was settled while looking at one model (BadNets on
    `demo`), where public code tries shares on test images.
    """

    unlearn: Unlearn = Unlearn(until_collapse=False)
    channel_fraction: Annotated[
        float,
        Interval(ge=0, le=1),
        "share of the channels, those that unlearning changed most, that are weakened",
    ] = 0.1
    weight_fraction: Annotated[
        float,
        Interval(ge=0, le=1),
        "share of such a channel's weights, those that changed most, that start from zero",
    ] = 0.7

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        unlearned = self.unlearn(model, defense_set.train, rng=rng.clone_state()).model
        return super().repair(
            self.zero_changed_weights(model, unlearned), defense_set, rng=rng, on_epoch=on_epoch
        )

    @torch.no_grad()
    def zero_changed_weights(self, model: nn.Module, unlearned: nn.Module) -> nn.Module:
        """A copy of `model` without the weights that differ most in `unlearned`; the classifier at
        the end keeps its own.
        """
        weakened = copy.deepcopy(model)
        kernels = [
            module.weight
            for module in weakened.modules()
            if isinstance(module, nn.Conv2d | nn.Linear) and module is not head(weakened)
        ]
        moved = {
            id(own): (other - own).abs().flatten(1)
            for own, other in zip(weakened.parameters(), unlearned.parameters(), strict=True)
            if own.dim() > 1
        }
        changes = [moved[id(kernel)] for kernel in kernels]  # [channels, weights]
        sums = torch.cat([change.sum(1) for change in changes])
        wanted = int(self.channel_fraction * len(sums))
        if not wanted:
            return weakened
        least = sums.topk(wanted).values[-1]
        for kernel, change in zip(kernels, changes):
            for channel in (change.sum(1) >= least).nonzero().flatten().tolist():
                largest = change[channel].topk(int(self.weight_fraction * change.shape[1])).indices
                kept = torch.ones_like(change[channel])
                kept[largest] = 0
                kernel[channel] *= kept.view_as(kernel[channel])
        return weakened
