"""Trigger-guided pruning: the unlearned model names the label, a trigger recovered for it names the neurons."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defences.base import PruningDefence
from rnp.detection.labels.class_shares import ClassShares
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.masks import maskable
from rnp.training import predict
from rnp.types import Bytes, DefenceSet, NeuronMask, OnEpoch, ignore, to_bytes, to_floats
from rnp.unlearn import Unlearn


@dataclass(frozen=True, kw_only=True)
class Guided(PruningDefence):
    """A neuron is suspicious when the recovered trigger excites it: by the rise of its mean activation, in deviations.

    The trigger found is seldom the attacker's, but it takes the same way through the network. Which label to look at is
    what the collapse of the unlearned model says; a wrong one costs little, since the shared rule spares what clean images
    need.

    Drawn at random: what unlearning and recovery draw.

    Source: ours; the label as in Li et al., ICML 2023, the trigger as in Wang et al., S&P 2019, the score after the trigger
    activation change of Zheng et al., ECCV 2022, which there needs the true trigger.
    """

    unlearn: Unlearn = Unlearn()
    search: NeuralCleanse = NeuralCleanse(steps=100, batch_size=64)

    def score(self, model: nn.Module, defence_set: DefenceSet, *, rng: torch.Generator, on_epoch: OnEpoch = ignore) -> NeuronMask:
        """Minus the rise, in deviations of the activation on clean images."""
        clean = defence_set.train
        unlearned, shares = self.unlearn(model, clean, rng=rng, on_epoch=on_epoch), ClassShares()
        way = unlearned.trajectory  # empty where no step could be taken
        label = int((shares.from_trajectory(way) if way else shares.score(unlearned.model, clean, rng=rng)).argmax())
        (trigger,) = self.search.recover_for([label], model, clean, rng=rng)
        victims = clean.images[clean.labels != label]
        triggered = to_bytes(trigger.apply(to_floats(victims)))
        before, after = activations(model, victims), activations(model, triggered)
        return {name: (mean - after[name][0]) / (deviation + 1e-3) for name, (mean, deviation) in before.items()}


def activations(model: nn.Module, images: Bytes) -> dict[str, tuple[Float[Tensor, "_"], Float[Tensor, "_"]]]:
    """Mean and deviation of each neuron behind a ReLU, over images and places, on the CPU; `model` is left as it was."""
    network, sums = copy.deepcopy(model).eval(), {}

    def listen(name: str, channels: int, output: Tensor) -> None:
        axis = 1 if output.shape[1] == channels else -1  # LayerNorm on tokens has them last
        values = output.detach().float().relu().movedim(axis, 0).flatten(1).double().cpu()
        sums[name] = sums.get(name, 0) + torch.stack([values.sum(1), values.square().sum(1), torch.full((channels,), values.shape[1])])

    for name, layer in maskable(network).items():
        layer.register_forward_hook(lambda _, __, output, name=name, n=len(layer.weight): listen(name, n, output))
    predict(network, images)
    found = {}
    for name, (total, squares, count) in sums.items():
        mean = total / count
        found[name] = mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float()
    return found
