"""The published RNP procedure, restated plainly, for the benchmark and the parity tests.

Source: the authors' release of December 2023 (main.py, mask_batchnorm.py), restated from a
description of it; no line is theirs.
Differs: the weights require no gradient while the masks are learned, which favors it; its clipping,
which acts on empty gradients, is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp.types import Images, Labels, NeuronMask

Batches = Callable[[], Iterable[tuple[Images, Labels]]]
"""One pass over the defense set, in a new order each time."""
STOP = 0.2
"""Running accuracy over an epoch at which the ascent ends, for ten classes."""
THRESHOLDS = tuple(i / 20 for i in range(19))


def ascent(
    model: nn.Module, batches: Batches, *, lr: float = 0.01, epochs: int = 21
) -> Iterator[tuple[nn.Module, float]]:
    """After each epoch the model, one copy that keeps changing, and its running accuracy.

    The caller stops at `STOP`.
    """
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[10, 20], gamma=0.1)
    for _ in range(epochs):
        model.train()
        correct = seen = 0
        for images, labels in batches():
            optimizer.zero_grad()
            logits = model(images)
            correct += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
            (-F.cross_entropy(logits, labels)).backward()
            optimizer.step()
        scheduler.step()
        yield model, correct / seen


class MaskedBatchNorm(nn.Module):
    """BatchNorm with the scale multiplied by a mask and the bias as it is."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm
        self.mask = nn.Parameter(torch.ones_like(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        if self.training:
            n.num_batches_tracked += 1
        return F.batch_norm(
            x,
            n.running_mean,
            n.running_var,
            n.weight * self.mask,
            n.bias,
            self.training,
            n.momentum,
            n.eps,
        )


def recovery(
    unlearned: nn.Module,
    batches: Batches,
    *,
    epochs: int = 20,
    after_step: Callable[[NeuronMask], None] = lambda masks: None,
) -> Iterator[tuple[nn.Module, NeuronMask]]:
    """After each epoch the masked model and its masks, which keep changing.

    SGD 0.2 with momentum 0.9 on 0.2 times the loss; masks are clamped to [0, 1] after each step.
    """
    model = copy.deepcopy(unlearned).requires_grad_(False)
    norms = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }
    masks = {}
    for name, norm in norms.items():
        parent, _, leaf = name.rpartition(".")
        layer = MaskedBatchNorm(norm)
        setattr(model.get_submodule(parent), leaf, layer)
        masks[name] = layer.mask
    optimizer = torch.optim.SGD(masks.values(), lr=0.2, momentum=0.9)
    for _ in range(epochs):
        model.train()
        for images, labels in batches():
            optimizer.zero_grad()
            (0.2 * F.cross_entropy(model(images), labels)).backward()
            optimizer.step()
            for mask in masks.values():
                mask.data.clamp_(0, 1)
            after_step({name: mask.data for name, mask in masks.items()})
        yield model, {name: mask.data for name, mask in masks.items()}


def write_masks(path: Path, masks: NeuronMask) -> None:
    """A line of text per neuron, the lowest mask first, with four decimals."""
    rows = [
        (float(value), name, index)
        for name, mask in masks.items()
        for index, value in enumerate(mask)
    ]
    path.write_text("".join(f"{name} {index} {value:.4f}\n" for value, name, index in sorted(rows)))


def sweep(model: nn.Module, masks: Path) -> Iterator[tuple[float, int, nn.Module]]:
    """Threshold, number of pruned neurons, and the model, one copy that keeps changing."""
    model = copy.deepcopy(model)
    rows = [line.split() for line in masks.read_text().splitlines()]
    pruned = 0
    for threshold in THRESHOLDS:
        while pruned < len(rows) and float(rows[pruned][2]) <= threshold:
            name, index, _ = rows[pruned]
            model.get_submodule(name).weight.data[int(index)] = 0
            pruned += 1
        yield threshold, pruned, model


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[tuple[Images, Labels]]) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode."""
    model.eval()
    loss = correct = seen = 0
    for images, labels in loader:
        logits = model(images)
        loss += F.cross_entropy(logits, labels).item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
        seen += len(labels)
    return loss / seen, correct / seen
