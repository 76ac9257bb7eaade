"""Which convolution feeds which normalization: seen in a forward pass, since the order of modules
does not say.
"""

from __future__ import annotations

from torch import Tensor, nn

from rnp.errors import UserError
from rnp.neurons.masks import maskable
from rnp.training.predict import predict
from rnp.types import Bytes


def convolution_of_norm(model: nn.Module, images: Bytes) -> dict[str, str]:
    """For each maskable layer the name of the convolution whose output it normalizes, and nothing
    but that output; a convolution that is masked itself feeds itself.

    `images` are any that the model takes; one is enough. `model` is left unchanged.

    Raises: UserError when a layer normalizes anything else, those of pre-activation networks sums;
    when it runs several times, behind different convolutions; when it does not run.
    """
    made: dict[
        int, tuple[Tensor, int, str]
    ] = {}  # the tensors are kept, so that no id serves twice
    fed: dict[str, set[str]] = {}  # "" stands for anything but a convolution

    def leave(name: str, output: Tensor) -> None:
        made[id(output)] = output, output._version, name

    def enter(name: str, given: Tensor) -> None:
        output, version, convolution = made.get(id(given), (None, 0, ""))
        changed = (
            output is None or version != given._version
        )  # a sum in place is the same tensor in a later version
        fed.setdefault(name, set()).add("" if changed else convolution)

    layers = maskable(model)
    handles = [
        module.register_forward_hook(lambda _, inputs, output, name=name: leave(name, output))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    ]
    handles += [
        layer.register_forward_pre_hook(lambda _, inputs, name=name: enter(name, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        predict(model, images)
    finally:
        for handle in handles:
            handle.remove()
    other = (
        "choose a defense that needs none, or an architecture that normalizes after each"
        " convolution"
    )
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d):
            fed[name] = {name}
        elif name not in fed:
            raise UserError(
                f"layer {name} takes no part in the forward pass, so its channels have no kernel;"
                f" {other}"
            )
        elif "" in fed[name]:
            raise UserError(
                f"layer {name} does not normalize the output of a convolution, so its channels have"
                f" no kernel; {other}"
            )
        elif len(fed[name]) > 1:
            raise UserError(
                f"layer {name} normalizes the outputs of several convolutions"
                f" ({', '.join(sorted(fed[name]))}), so its channels have no kernel of their own;"
                f" {other}"
            )
    return {name: fed[name].pop() for name in layers}
