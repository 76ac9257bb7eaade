"""The features of a classifier: the inputs of its last linear layer."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.types import Images, Logits


def head(model: nn.Module) -> nn.Linear:
    """The last linear layer.

    Raises: UserError when there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UserError(
            f"{type(model).__name__} has no linear layer, whose input would be its features"
        )
    return layers[-1]


def features(model: nn.Module, images: Images) -> tuple[Float[Tensor, "n d"], Logits]:
    """Penultimate activations and logits; gradients reach the images."""
    inputs: list[Tensor] = []
    handle = head(model).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        logits = model(images)
    finally:
        handle.remove()
    return inputs[-1], logits
