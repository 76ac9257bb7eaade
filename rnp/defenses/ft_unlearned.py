"""FT with the unlearned model: the weights that unlearning changes most are reset to zero first."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defenses.base import Repaired
from rnp.defenses.ft import FT
from rnp.models.features import head
from rnp.types import DefenseSet, OnEpoch, no_callback
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class FTUnlearned(FT):
    """Zero the most changed weights of the most changed channels, then fine-tune.

    A channel is a row of the kernel of a convolution or linear layer, except for the classifier at
    the end; its change is the sum of the absolute changes of its weights.

    Drawn at random: what unlearning draws, and for the fine-tuning the same numbers as in `ft`.

    Source: Lin et al., NeurIPS 2024 (TSBD), arXiv 2405.20291: both stages, with its 0.7 of the
    weights.
    Differs: unlearns as RNP does; the fine-tuning is that of `ft`, without a penalty on the norm
    of the gradient; the fraction of the channels was chosen on one model (BadNets on `demo`),
    where public code tries fractions on test images.
    """

    unlearn: Unlearn = Unlearn(until_collapse=False)
    channel_fraction: Annotated[
        float,
        Interval(ge=0, le=1),
        "fraction of the channels, the most changed ones, that lose weights",
    ] = 0.1
    weight_fraction: Annotated[
        float,
        Interval(ge=0, le=1),
        "fraction of the weights of such a channel, the most changed ones, that are set to zero",
    ] = 0.7

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        """Return a tuned copy of `model`; `on_epoch` receives the fine-tuning only."""
        unlearned = self.unlearn(model, defense_set.train, rng=rng.clone_state()).model
        start = self.zero_changed_weights(model, unlearned)
        return super().repair(start, defense_set, rng=rng, on_epoch=on_epoch)

    @torch.no_grad()
    def zero_changed_weights(self, model: nn.Module, unlearned: nn.Module) -> nn.Module:
        """A copy of `model` in which the weights that differ most from `unlearned` are zero."""
        zeroed = copy.deepcopy(model)
        changes = kernel_changes(zeroed, unlearned)
        channel_changes = torch.cat([change.sum(1) for _, change in changes])
        num_channels = int(self.channel_fraction * len(channel_changes))
        if num_channels == 0:
            return zeroed
        smallest = channel_changes.topk(num_channels).values[-1]
        for kernel, change in changes:
            num_weights = int(self.weight_fraction * change.shape[1])
            for channel in (change.sum(1) >= smallest).nonzero().flatten().tolist():
                kept = torch.ones_like(change[channel])
                kept[change[channel].topk(num_weights).indices] = 0
                kernel[channel] *= kept.view_as(kernel[channel])
        return zeroed


def kernel_changes(
    model: nn.Module, unlearned: nn.Module
) -> list[tuple[Tensor, Float[Tensor, "_ _"]]]:
    """Each kernel of `model` but the classifier's, and its absolute changes [channels, weights]."""
    classifier = head(model)
    counterparts = {
        id(own): other
        for own, other in zip(model.parameters(), unlearned.parameters(), strict=True)
    }
    kernels = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and module is not classifier
    ]
    return [(kernel, (counterparts[id(kernel)] - kernel).abs().flatten(1)) for kernel in kernels]
