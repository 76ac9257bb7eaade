"""CLP: prune the channels whose convolution and BatchNorm can stretch their input most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from rnp.defenses.base import PruningDefense, suspicion_to_score
from rnp.neurons.convolutions import convolution_of_norm
from rnp.neurons.masks import batch_norms
from rnp.types import DefenseSet, NeuronMask, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class CLP(PruningDefense):
    """The score looks at weights alone: largest singular value of a channel's kernel, times
    |scale| / running deviation.

    Source: Zheng et al., ECCV 2022, "Data-free backdoor removal based on channel Lipschitzness".
    Differs: the convolution of each BatchNorm is found by a forward pass; by module order public
    code pairs wrongly where BatchNorm comes first. Deviations are counted over n channels, not n -
    1, so that a layer of one channel has a score. The shared rule decides how many channels go.
    The paper's own, all at least u = 3 deviations above the mean of their layer, without data, is
    `prune.rule threshold`, `prune.threshold -3` and `prune.zero_bias`; in a layer of n channels no
    value lies more than sqrt(n - 1) deviations out, so that it names none in a layer of fewer than
    ten.
    """

    def score(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> NeuronMask:
        """Deviations below the mean of the layer; of `defense_set` only the shape of its images is
        used.
        """
        layers, lipschitz = batch_norms(model, "clp"), {}
        convolutions = convolution_of_norm(model, defense_set.train.images[:1])
        for name, layer in layers.items():
            kernel = (
                model.get_submodule(convolutions[name]).weight.detach().flatten(2)
            )  # [out, in, kh*kw]
            gain = layer.weight.detach().abs() / (layer.running_var + layer.eps).sqrt()
            lipschitz[name] = torch.linalg.matrix_norm(kernel, ord=2) * gain  # [out]
        return suspicion_to_score(lipschitz)
