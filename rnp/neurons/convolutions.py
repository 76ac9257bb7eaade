"""Which convolution feeds which normalization.

This is observed in a forward pass, since the order of the modules does not tell.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from rnp.errors import UserError
from rnp.neurons.masks import maskable
from rnp.training.predict import predict
from rnp.types import Bytes

NO_CONVOLUTION = ""
REMEDY = (
    "choose a defense that needs none, or an architecture that normalizes after each convolution"
)


def convolution_of_norm(model: nn.Module, images: Bytes) -> dict[str, str]:
    """For each maskable layer, the name of the convolution whose output it normalizes.

    A convolution that is itself masked is its own. `images` are any that the model takes; one is
    enough. `model` is left unchanged.

    Raises: UserError when a layer normalizes anything but the output of one convolution (sums, in
    pre-activation networks), runs after different convolutions, or does not run.
    """
    layers = maskable(model)
    sources = observe_sources(model, layers, images)
    pairs = {}
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            pairs[name] = name
        else:
            pairs[name] = only_source(name, sources.get(name, set()))
    return pairs


def observe_sources(
    model: nn.Module, layers: dict[str, nn.Module], images: Bytes
) -> dict[str, set[str]]:
    """For each layer that runs, the convolutions whose outputs it receives.

    `NO_CONVOLUTION` stands for every other input.
    """
    # The outputs are kept: of a freed tensor, another one could get the id.
    outputs: dict[int, tuple[Tensor, int, str]] = {}
    sources: dict[str, set[str]] = {}

    def after_convolution(name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        outputs[id(output)] = (output, output._version, name)

    def before_layer(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        received = inputs[0]
        _, version, convolution = outputs.get(id(received), (None, -1, NO_CONVOLUTION))
        # A sum in place returns the same tensor in a later version.
        source = convolution if version == received._version else NO_CONVOLUTION
        sources.setdefault(name, set()).add(source)

    handles = [
        module.register_forward_hook(partial(after_convolution, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    handles += [
        layer.register_forward_pre_hook(partial(before_layer, name))
        for name, layer in layers.items()
    ]
    try:
        predict(model, images)
    finally:
        for handle in handles:
            handle.remove()
    return sources


def only_source(name: str, sources: set[str]) -> str:
    """The one convolution in `sources`.

    Raises: UserError when there is anything else.
    """
    if not sources:
        raise UserError(
            f"layer {name} takes no part in the forward pass, so its channels have no kernel;"
            f" {REMEDY}"
        )
    if NO_CONVOLUTION in sources:
        raise UserError(
            f"layer {name} does not normalize the output of a convolution, so its channels have"
            f" no kernel; {REMEDY}"
        )
    if len(sources) > 1:
        raise UserError(
            f"layer {name} normalizes the outputs of several convolutions"
            f" ({', '.join(sorted(sources))}), so its channels have no kernel of their own;"
            f" {REMEDY}"
        )
    return next(iter(sources))
