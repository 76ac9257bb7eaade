"""Neuron masks on the channels of BatchNorm layers, by functional call: no architecture is rewritten."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rnp.errors import UserError
from rnp.types import Images, Logits, NeuronMask

Neuron = tuple[str, int]
"""Layer name and channel index."""


def maskable(model: nn.Module) -> dict[str, nn.Module]:
    """The affine BatchNorm layers by name; one neuron is one channel of one of them.

    Raises: UserError when there is none.
    """
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine}
    if not layers:
        raise UserError(f"{type(model).__name__} has no affine BatchNorm layer, and neurons are masked there;"
                        " choose an architecture with BatchNorm")
    return layers


def ones(model: nn.Module) -> NeuronMask:
    """A mask that changes nothing."""
    return {name: torch.ones_like(layer.weight.detach()) for name, layer in maskable(model).items()}


def masked(model: nn.Module, images: Images, mask: NeuronMask) -> Logits:
    """The forward pass of `model` with each channel's scale multiplied by its mask; gradients reach the mask.

    In train mode the running statistics of `model` move, as they would in its own forward pass.
    """
    scales = {f"{name}.weight": model.get_submodule(name).weight.detach() * value for name, value in mask.items()}
    return functional_call(model, scales, (images,))


def ranking(mask: NeuronMask) -> list[Neuron]:
    """All neurons, the most suspicious first; ties by layer order, then index.

    The last channel left in a layer is never listed: a layer without channels computes nothing.
    """
    values = torch.cat([value.detach().flatten().cpu().double() for value in mask.values()])
    neurons = [(name, index) for name, value in mask.items() for index in range(len(value))]
    left = {name: len(value) for name, value in mask.items()}
    order = []
    for position in values.argsort(stable=True).tolist():
        name, index = neurons[position]
        if left[name] > 1:
            left[name] -= 1
            order.append((name, index))
    return order


@torch.no_grad()
def prune(model: nn.Module, neurons: Iterable[Neuron], *, zero_bias: bool = False) -> nn.Module:
    """A copy of `model` whose named channels have BatchNorm scale 0; the bias stays unless `zero_bias`.

    Source: Wu and Wang, NeurIPS 2021 (ANP), whose convention RNP follows: the channel then puts out its bias.
    """
    pruned = copy.deepcopy(model)
    for neuron in neurons:
        cut(pruned, neuron, zero_bias=zero_bias)
    return pruned


@torch.no_grad()
def cut(model: nn.Module, neuron: Neuron, *, zero_bias: bool = False) -> None:
    """Take one channel out of `model` itself."""
    name, index = neuron
    layer = model.get_submodule(name)
    layer.weight[index] = 0
    if zero_bias:
        layer.bias[index] = 0


def freeze_statistics(model: nn.Module, frozen: bool) -> nn.Module:
    """Train mode, with BatchNorm in eval mode when `frozen`: its statistics then stay, its weights still train."""
    model.train()
    if frozen:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
    return model
