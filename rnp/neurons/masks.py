"""Neuron masks on the channels of normalization layers, by functional call: no architecture is
rewritten.
"""

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
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def maskable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose channels are the neurons, by name: every normalization with one scale per
    channel (BatchNorm, InstanceNorm, GroupNorm, LayerNorm, RMSNorm), whatever it normalizes; in a
    network without any, the convolutions, whose scale is their kernel. A layer that runs several
    times in a forward pass is one layer: its neurons are masked in each run.

    Raises: UserError when there is neither, or when the scale of a layer is not its own.
    """
    modules = dict(model.named_modules())
    norms = {
        name: module
        for name, module in modules.items()
        if isinstance(module, NORMS)
        and getattr(module, "weight", None) is not None
        and module.weight.dim() == 1
    }
    layers = norms or {
        name: module for name, module in modules.items() if isinstance(module, nn.Conv2d)
    }
    if not layers:
        raise UserError(
            f"{type(model).__name__} has neither a normalization with a scale per channel nor a"
            " convolution, and neurons are masked there; choose another architecture"
        )
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        kind = type(layer)
        if "weight" not in layer._parameters or (
            isinstance(layer, nn.Conv2d) and kind.forward is not nn.Conv2d.forward
        ):
            raise UserError(
                f"layer {name} ({kind.__name__}) makes its weight anew in each forward pass, so"
                " that no channel can be cut out of it; remove the parametrization, or choose"
                " another architecture"
            )
        shared = [
            other
            for part in (layer.weight, bias(layer))
            if part is not None
            for other in owners[id(part)]
            if other != name
        ]
        if shared:
            raise UserError(
                f"layers {name} and {shared[0]} share a weight, so that no channel belongs to one"
                " of them; give each its own"
            )
    return layers


def bias(layer: nn.Module) -> Tensor | None:
    """What a maskable layer adds to its channels, if anything."""
    return getattr(layer, "bias", None)


def batch_norms(model: nn.Module, method: str) -> dict[str, nn.Module]:
    """The same layers, for a method that reads what BatchNorm remembers of the training.

    Raises: UserError when one of them is no BatchNorm, or remembers nothing.
    """
    layers = maskable(model)
    for name, layer in layers.items():
        if getattr(layer, "running_var", None) is None:
            raise UserError(
                f"{method} reads BatchNorm's running statistics, which layer {name}"
                f" ({type(layer).__name__}) lacks; choose another defense"
            )
    return layers


def broadcast_to_weight(value: Tensor, weight: Tensor) -> Tensor:
    """`value`, one number per channel, in a shape that multiplies the channels of `weight`."""
    return value.view(-1, *[1] * (weight.dim() - 1))


def unit_mask(model: nn.Module) -> NeuronMask:
    """A mask that changes nothing."""
    return {
        name: torch.ones(len(layer.weight), device=layer.weight.device)
        for name, layer in maskable(model).items()
    }


def forward_masked(model: nn.Module, images: Images, mask: NeuronMask) -> Logits:
    """The forward pass of `model` with each channel's scale multiplied by its mask; gradients
    reach the mask.

    In train mode the running statistics of `model` move, as they would in its own forward pass.
    """
    weights = {name: model.get_submodule(name).weight.detach() for name in mask}
    scales = {
        f"{name}.weight": weights[name] * broadcast_to_weight(value, weights[name])
        for name, value in mask.items()
    }
    return functional_call(model, scales, (images,))


def rank_neurons(mask: NeuronMask) -> list[Neuron]:
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
    """A copy of `model` whose named channels have scale 0; the bias stays unless `zero_bias`.

    Source: Wu and Wang, NeurIPS 2021 (ANP), whose convention RNP follows: the channel then puts
    out its bias.
    """
    pruned = copy.deepcopy(model)
    for neuron in neurons:
        zero_channel(pruned, neuron, zero_bias=zero_bias)
    return pruned


@torch.no_grad()
def zero_channel(model: nn.Module, neuron: Neuron, *, zero_bias: bool = False) -> None:
    """Take one channel out of `model` itself."""
    name, index = neuron
    layer = model.get_submodule(name)
    layer.weight[index] = 0
    if zero_bias and bias(layer) is not None:
        layer.bias[index] = 0


def freeze_statistics(model: nn.Module, frozen: bool) -> nn.Module:
    """Train mode, with BatchNorm in eval mode when `frozen`: its statistics then stay, its weights
    still train.
    """
    model.train()
    if frozen:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
    return model
