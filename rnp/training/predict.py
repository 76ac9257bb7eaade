"""Logits and accuracy of a model, in eval mode."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.models.classifier import evaluating
from rnp.training.device import Precision, autocast, device_of
from rnp.types import ImageSet, Labels, Logits, to_floats

EVAL_BATCH = 500
"""Largest number of images in one forward pass."""
EVAL_VALUES = 2**23
"""Largest number of their values; the activations of the first layer are many times that."""


def eval_batches(images: Tensor) -> tuple[Tensor, ...]:
    """Parts for one forward pass each: `EVAL_BATCH` images, fewer of large ones."""
    values_per_image = max(1, images[:1].numel())
    return images.split(max(1, min(EVAL_BATCH, EVAL_VALUES // values_per_image)))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, precision: Precision = "fp32") -> Logits:
    """Logits of all `images` (uint8 or floats, [n, c, h, w]) on the CPU, in eval mode.

    The modes of `model` are restored afterwards.

    Raises: UserError when the model returns anything but logits.
    """
    device = device_of(model)
    logits = []
    with evaluating(model), autocast(precision, device):
        for batch in eval_batches(images):
            batch = batch.to(device)
            batch = to_floats(batch) if batch.dtype == torch.uint8 else batch
            logits.append(require_logits(model(batch), len(batch)).float().cpu())
    return torch.cat(logits)


def require_logits(output: object, n: int) -> Tensor:
    """The output of a model for `n` images, if it is [n, k].

    Raises: UserError when it is anything else.
    """
    if isinstance(output, Tensor) and output.dim() == 2 and len(output) == n:
        return output
    kind = type(output).__name__
    if isinstance(output, Tensor):
        kind = f"tensor of shape {list(output.shape)}"
    raise UserError(
        f"for {n} images the model returns a {kind}, not logits of shape [{n}, classes];"
        " rnp repairs classifiers with one head"
    )


def accuracy(model: nn.Module, data: ImageSet, *, precision: Precision = "fp32") -> float:
    """The share of `data` that `model` classifies correctly."""
    predicted = predict(model, data.images, precision=precision).argmax(1)
    return (predicted == data.labels).float().mean().item()


def class_shares(predicted: Labels, labels: Labels, k: int) -> Float[Tensor, "k"]:
    """The share of each class among the predictions for images of the *other* classes.

    Correct predictions therefore do not count.
    """
    classes = torch.arange(k).unsqueeze(1)  # [k, 1]
    others = labels != classes  # [k, n]
    return ((predicted == classes) & others).sum(1) / others.sum(1).clamp_min(1)
