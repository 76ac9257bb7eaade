"""Neuron masks: one factor per channel of the normalization layers, for any architecture.

Masks are applied by functional call, so no architecture is rewritten.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rnp.errors import UserError
from rnp.types import Images, Logits, NeuronMask

Neuron = tuple[str, int]
"""Layer name and channel index."""
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


def maskable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose channels are the neurons, by name.

    These are the normalizations with one scale per channel (BatchNorm, InstanceNorm, GroupNorm,
    LayerNorm, RMSNorm), whatever they normalize. In a network without any, they are the
    convolutions, whose scale is their kernel. A layer that runs several times in a forward pass
    counts once: its neurons are masked in each run.

    Raises: UserError when there is neither, or when a layer shares or recomputes its scale.
    """
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if has_channel_scale(module)}
    if not layers:
        layers |= {name: layer for name, layer in modules.items() if isinstance(layer, nn.Conv2d)}
    if not layers:
        raise UserError(
            f"{type(model).__name__} has neither a normalization with a scale per channel nor a"
            " convolution, and neurons are masked there; choose another architecture"
        )
    for name, layer in layers.items():
        require_own_parameters(name, layer)
    require_unshared_parameters(layers, modules)
    return layers


def has_channel_scale(module: nn.Module) -> bool:
    """Whether `module` is a normalization with one scale per channel."""
    weight = module.weight if isinstance(module, NORMS) else None
    return isinstance(weight, Tensor) and weight.dim() == 1


def require_own_parameters(name: str, layer: nn.Module) -> None:
    """Raises: UserError when `layer` computes its weight, so that setting it has no effect."""
    kind = type(layer)
    standardized = isinstance(layer, nn.Conv2d) and kind.forward is not nn.Conv2d.forward
    if "weight" not in layer._parameters or standardized:
        raise UserError(
            f"layer {name} ({kind.__name__}) recomputes its weight in each forward pass, so its"
            " channels cannot be pruned; remove the parametrization, or choose another"
            " architecture"
        )


def require_unshared_parameters(
    layers: dict[str, nn.Module], modules: dict[str, nn.Module]
) -> None:
    """Raises: UserError when one of `layers` shares a parameter with another of `modules`."""
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(name)
    for name, layer in layers.items():
        parameters = [part for part in (scale(layer), bias(layer)) if part is not None]
        for other in (owner for part in parameters for owner in owners[id(part)]):
            if other != name:
                raise UserError(
                    f"layers {name} and {other} share a weight, so no channel belongs to one of"
                    " them; give each its own"
                )


def scale(layer: nn.Module) -> Tensor:
    """The weight of a maskable layer: a scale, or in convolutions a kernel, per channel."""
    return cast("Tensor", layer.weight)


def bias(layer: nn.Module) -> Tensor | None:
    """What a maskable layer adds to its channels, if anything."""
    return getattr(layer, "bias", None)


def batch_norms(model: nn.Module, method: str) -> dict[str, nn.Module]:
    """The maskable layers, for a method that needs the running statistics of BatchNorm.

    Raises: UserError when a layer has no running statistics.
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
    scales = {name: scale(layer) for name, layer in maskable(model).items()}
    return {name: torch.ones(len(value), device=value.device) for name, value in scales.items()}


def forward_masked(model: nn.Module, images: Images, mask: NeuronMask) -> Logits:
    """The forward pass of `model` with each channel's scale multiplied by its mask.

    Gradients reach the mask. In train mode the running statistics of `model` are updated, as in
    its own forward pass.
    """
    masked = {}
    for name, value in mask.items():
        weight = scale(model.get_submodule(name)).detach()
        masked[f"{name}.weight"] = weight * broadcast_to_weight(value, weight)
    return functional_call(model, masked, (images,))


def rank_neurons(mask: NeuronMask) -> list[Neuron]:
    """All neurons, the most suspicious first; ties by layer order, then index.

    The last channel of each layer is left out: a layer without channels computes nothing.
    """
    values = torch.cat([value.detach().flatten().cpu().double() for value in mask.values()])
    neurons = [(name, index) for name, value in mask.items() for index in range(len(value))]
    remaining = {name: len(value) for name, value in mask.items()}
    order = []
    for position in values.argsort(stable=True).tolist():
        name, index = neurons[position]
        if remaining[name] > 1:
            remaining[name] -= 1
            order.append((name, index))
    return order


@torch.no_grad()
def prune(model: nn.Module, neurons: Iterable[Neuron], *, zero_bias: bool = False) -> nn.Module:
    """A copy of `model` in which the given channels have scale 0.

    The bias stays, unless `zero_bias`.

    Source: Wu and Wang, NeurIPS 2021 (ANP), whose convention RNP follows: a pruned channel
    outputs its bias.
    """
    pruned = copy.deepcopy(model)
    for neuron in neurons:
        zero_channel(pruned, neuron, zero_bias=zero_bias)
    return pruned


@torch.no_grad()
def zero_channel(model: nn.Module, neuron: Neuron, *, zero_bias: bool = False) -> None:
    """Prune one channel of `model` in place."""
    name, index = neuron
    layer = model.get_submodule(name)
    scale(layer)[index] = 0
    shift = bias(layer)
    if zero_bias and shift is not None:
        shift[index] = 0


def freeze_statistics(model: nn.Module, frozen: bool) -> nn.Module:
    """`model` in train mode, with BatchNorm in eval mode when `frozen`.

    The running statistics of BatchNorm then stay; its weights are still trained.
    """
    model.train()
    if frozen:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.eval()
    return model
