"""CLP: prune the channels whose convolution and BatchNorm can amplify their input most."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rnp.defenses.base import PruningDefense, suspicion_to_score
from rnp.neurons.convolutions import convolution_of_norm
from rnp.neurons.masks import batch_norms
from rnp.types import DefenseSet, NeuronMask, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class CLP(PruningDefense):
    """Channel Lipschitzness: the kernel's largest singular value times |scale| / running deviation.

    Source: Zheng et al., ECCV 2022, "Data-free backdoor removal based on channel Lipschitzness".
    Differs: the convolution of each BatchNorm is found by a forward pass; by module order public
    code pairs wrongly where BatchNorm comes first. Deviations are counted over n channels, not n -
    1, so that a layer of one channel has a score. The shared rule decides how many channels are
    pruned. The paper's own, all channels at least u = 3 deviations above the mean of their layer,
    without data, is `prune.rule threshold`, `prune.threshold -3` and `prune.zero_bias`; in a layer
    of n channels no value is more than sqrt(n - 1) deviations from the mean, so that it prunes
    none in a layer of fewer than ten.
    """

    def score(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> NeuronMask:
        """Deviations below the mean of the layer, from weights alone; nothing is random.

        Of `defense_set` only the shape of its images is used.
        """
        layers = batch_norms(model, "clp")
        convolutions = convolution_of_norm(model, defense_set.train.images[:1])
        lipschitz = {}
        for name, layer in layers.items():
            convolution = model.get_submodule(convolutions[name])
            assert isinstance(layer, _NormBase)
            assert isinstance(convolution, nn.Conv2d)
            kernel = convolution.weight.detach().flatten(2)  # [out, in, kh*kw]
            deviation = (layer.get_buffer("running_var") + layer.eps).sqrt()
            gain = layer.get_parameter("weight").detach().abs() / deviation
            lipschitz[name] = torch.linalg.matrix_norm(kernel, ord=2) * gain  # [out]
        return suspicion_to_score(lipschitz)
