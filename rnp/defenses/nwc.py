"""NWC: prune the channels whose kernels change most when the model unlearns clean images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnp.defenses.base import PruningDefense
from rnp.neurons.convolutions import convolution_of_norm
from rnp.types import DefenseSet, NeuronMask, OnEpoch, no_callback
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class NWC(PruningDefense):
    """Neuron weight change: the summed absolute change of the kernel that feeds each channel.

    Drawn at random: what unlearning draws.

    Source: Lin et al., NeurIPS 2024 (TSBD), arXiv 2405.20291: its first stage.
    Differs: unlearns as RNP does, so that the two rankings compare; whole channels are pruned by
    the shared rule, not 70 % of the weights of a fixed fraction of them; no fine-tuning follows,
    since that second stage would hide how good the ranking is.
    """

    unlearn: Unlearn = Unlearn(until_collapse=False)

    def score(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> NeuronMask:
        """The change with a minus sign, in the units of the weights."""
        convolutions = convolution_of_norm(model, defense_set.train.images[:1])
        unlearned = self.unlearn(model, defense_set.train, rng=rng, on_epoch=on_epoch).model
        scores = {}
        for name, convolution in convolutions.items():
            change = kernel(unlearned, convolution) - kernel(model, convolution)
            scores[name] = -change.abs().flatten(1).sum(1).cpu()
        return scores


def kernel(model: nn.Module, convolution: str) -> Tensor:
    """The weights [out, in, kh, kw] of the convolution of that name."""
    layer = model.get_submodule(convolution)
    assert isinstance(layer, nn.Conv2d)
    return layer.weight.detach()
