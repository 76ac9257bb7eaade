"""BNP: prune the channels whose BatchNorm statistics differ from those of clean images."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rnp.defenses.base import PruningDefense, suspicion_to_score
from rnp.neurons.masks import batch_norms
from rnp.training.device import device_of
from rnp.training.predict import eval_batches
from rnp.types import DefenseSet, ImageSet, NeuronMask, OnEpoch, no_callback, to_floats


@dataclass(frozen=True, kw_only=True)
class BNP(PruningDefense):
    """KL divergence of the running statistics from those of clean images, each as a Gaussian.

    The running statistics include poisoned images. They must be those that training left: after
    unlearning or fine-tuning they say nothing about the poison.

    Source: Zheng et al., NeurIPS 2022, "Pre-activation distributions expose backdoor neurons".
    Differs: clean statistics are of all images of the defender; the shared rule decides how many
    channels are pruned. The paper's own, all channels at least u = 3 deviations above the mean of
    their layer, is `prune.rule threshold` and `prune.threshold -3`.
    """

    def score(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> NeuronMask:
        """Deviations below the mean of the layer; nothing is random."""
        running = batch_norms(model, "bnp")
        clean = batch_norms(with_statistics_of(defense_set.all, model), "bnp")
        return suspicion_to_score(
            {name: divergence(running[name], clean[name]) for name in running}
        )


@torch.no_grad()
def with_statistics_of(data: ImageSet, model: nn.Module) -> nn.Module:
    """A copy of `model` whose running statistics are those of `data`.

    Batches are normalized by their own statistics, as in training.
    """
    copied = copy.deepcopy(model).eval()
    for layer in batch_norms(copied, "bnp").values():
        assert isinstance(layer, _NormBase)
        layer.train().reset_running_stats()
        layer.momentum = None  # the plain average over batches
    # Batches of nearly equal sizes, since each counts the same in the average.
    for batch in data.images.chunk(len(eval_batches(data.images))):
        copied(to_floats(batch.to(device_of(copied))))
    return copied


def divergence(running: nn.Module, clean: nn.Module) -> Tensor:
    """KL(running || clean) per channel, in nats."""
    mean, variance = statistics(running)
    clean_mean, clean_variance = statistics(clean)
    log_ratio = (clean_variance / variance).log()
    shift = mean - clean_mean
    return (log_ratio + (variance + shift.square()) / clean_variance - 1) / 2


def statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel by which a BatchNorm normalizes in eval mode."""
    assert isinstance(layer, _NormBase)
    return layer.get_buffer("running_mean"), layer.get_buffer("running_var") + layer.eps
