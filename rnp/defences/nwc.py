"""NWC: prune the channels whose kernels change most when the model unlearns clean images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rnp.defences.base import PruningDefence
from rnp.types import DefenceSet, NeuronMask, OnEpoch, ignore
from rnp.unlearn import Unlearn
from rnp.wiring import feeding


@dataclass(frozen=True, kw_only=True)
class NWC(PruningDefence):
    """Neuron weight change: the summed absolute change of the kernel that feeds each channel.

    Source: Lin et al., NeurIPS 2024 (TSBD), arXiv 2405.20291: its first stage.
    Differs: unlearns as RNP does, so that the rankings of the two compare; whole channels go, by
    the shared rule, not 70 % of the weights of a fixed share of them; no fine-tuning follows. That
    second stage would hide what the ranking is worth.
    """

    unlearn: Unlearn = Unlearn(to_collapse=False)

    def score(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> NeuronMask:
        """The change with a minus sign, in the units of the weights."""
        convolutions = feeding(model, defence_set.train.images[:1])
        unlearned = self.unlearn(model, defence_set.train, rng=rng, on_epoch=on_epoch).model
        before, after = (
            {
                name: net.get_submodule(convolution).weight.detach()
                for name, convolution in convolutions.items()
            }
            for net in (model, unlearned)
        )
        return {
            name: -(after[name] - before[name]).abs().flatten(1).sum(1).cpu()
            for name in convolutions
        }
