"""Logits and accuracy of a model, in eval mode."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.models.classifier import evaluating
from rnp.training.device import Precision, autocast, device_of
from rnp.types import (
    ImageSet,
    Labels,
    Logits,
    to_floats,
)

EVAL_BATCH = 500
EVAL_VALUES = (
    2**23
)  # of images in one forward pass; the activations of its first layer are many times that


def eval_batches(images: Tensor) -> tuple[Tensor, ...]:
    """Parts for one forward pass each: `EVAL_BATCH` images, fewer of large ones."""
    return images.split(max(1, min(EVAL_BATCH, EVAL_VALUES // max(1, images[:1].numel()))))


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, precision: Precision = "fp32") -> Logits:
    """Logits of all `images` (uint8 or floats, [n, c, h, w]) on the CPU, in eval mode; `model` is
    left as it was.

    Raises: UserError when the model answers with anything but logits.
    """
    device, logits = device_of(model), []
    with evaluating(model), autocast(precision, device):
        for part in eval_batches(images):
            part = part.to(device)
            part = to_floats(part) if part.dtype == torch.uint8 else part
            logits.append(require_logits(model(part), len(part)).float().cpu())
    return torch.cat(logits)


def require_logits(answer: object, n: int) -> Tensor:
    """Raises: UserError when a model's answer for `n` images is no [n, k]."""
    if not isinstance(answer, Tensor) or answer.dim() != 2 or len(answer) != n:
        shape = (
            f"tensor of shape {list(answer.shape)}"
            if isinstance(answer, Tensor)
            else type(answer).__name__
        )
        raise UserError(
            f"the model answers {n} images with a {shape}, not with logits of shape [{n}, classes];"
            " rnp repairs classifiers with one head"
        )
    return answer


def accuracy(model: nn.Module, data: ImageSet, *, precision: Precision = "fp32") -> float:
    return (
        (predict(model, data.images, precision=precision).argmax(1) == data.labels)
        .float()
        .mean()
        .item()
    )


def class_shares(predicted: Labels, labels: Labels, k: int) -> Float[Tensor, "k"]:
    """For each class its share of the predictions for images of the *other* classes; accuracy that
    is left does not count.
    """
    classes = torch.arange(k).unsqueeze(1)  # [k, 1]
    other = labels != classes  # [k, n]
    return ((predicted == classes) & other).sum(1) / other.sum(1).clamp_min(1)
