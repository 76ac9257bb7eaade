"""BNP: prune the channels whose BatchNorm remembers other inputs than clean images give it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rnp.defenses.base import PruningDefense, suspicion_to_score
from rnp.neurons.masks import batch_norms, maskable
from rnp.training.device import device_of
from rnp.training.predict import eval_batches
from rnp.types import DefenseSet, ImageSet, NeuronMask, OnEpoch, no_callback, to_floats


@dataclass(frozen=True, kw_only=True)
class BNP(PruningDefense):
    """KL divergence of the running statistics, which saw the poison, from those of clean images,
    each as a Gaussian.

    Source: Zheng et al., NeurIPS 2022, "Pre-activation distributions expose backdoor neurons".
    Differs: clean statistics are of all images of the defender; the shared rule decides how many
    channels go. The paper's own, all at least u = 3 deviations above the mean of their layer, is
    `prune.rule threshold` and `prune.threshold -3`. The model must hold the statistics that
    training left: an unlearned or fine-tuned one tells nothing.
    """

    def score(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> NeuronMask:
        """Deviations below the mean of the layer."""
        layers = batch_norms(model, "bnp")
        clean = maskable(with_statistics_of(defense_set.all, model))
        return suspicion_to_score(
            {name: divergence(layer, clean[name]) for name, layer in layers.items()}
        )


@torch.no_grad()
def with_statistics_of(data: ImageSet, model: nn.Module) -> nn.Module:
    """A copy of `model` whose running statistics are those of `data`, by the normalization that
    training used.
    """
    copied = copy.deepcopy(model).eval()
    for layer in maskable(copied).values():
        layer.train().reset_running_stats()
        layer.momentum = None  # the plain average over batches
    for part in data.images.chunk(
        len(eval_batches(data.images))
    ):  # of like sizes, since each batch counts alike
        copied(to_floats(part.to(device_of(copied))))
    return copied


def divergence(running: nn.Module, clean: nn.Module) -> Tensor:
    """KL(running || clean) per channel, in nats: shift and spread count in deviations of the clean
    images.
    """
    one, other = running.running_var + running.eps, clean.running_var + clean.eps
    shift = running.running_mean - clean.running_mean
    return ((other / one).log() + (one + shift.square()) / other - 1) / 2
