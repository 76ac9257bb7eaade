"""Neural Cleanse: the smallest mask and pattern that send all images to a label."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Interval
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rnp.detection.base import RecoveredTrigger, TriggerRecovery, blend, measure_trigger
from rnp.training.device import autocast, chosen_precision, device_of
from rnp.training.predict import predict
from rnp.types import ImageSet, Indices, to_floats


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(TriggerRecovery):
    """Mask and pattern for every label, optimized together.

    The mask is the smallest of many that reached `success` on batches, so its success on all
    images is some points lower.

    Drawn at random: the images of each step.

    Source: Wang et al., S&P 2019, section IV; optimizer and factors on the cost as in
    backdoor-toolbox.
    Differs: all labels share each forward pass, each with its own mask, cost and success. The cost
    changes after batches, not after epochs. A label is optimized on the images that the model does
    not assign to it already, so that success means success above the baseline: otherwise an empty
    mask would do for an unlearned model, which assigns most images to one label.
    """

    steps: Annotated[int, Gt(0), "optimization steps"] = 300
    batch_size: Annotated[int, Gt(0), "images per label and step"] = 16
    lr: Annotated[float, Gt(0), "learning rate of Adam, for mask and pattern"] = 0.1
    init_cost: Annotated[float, Gt(0), "weight of the mask's size at the start"] = 1e-3
    multiplier: Annotated[
        float,
        Gt(1),
        "factor by which that weight is raised; it is lowered by the factor to the power of 1.5",
    ] = 1.5
    success: Annotated[
        float, Interval(gt=0, le=1), "share of a batch that must reach the label"
    ] = 0.99
    patience: Annotated[
        int,
        Gt(0),
        "successes in a row that prove a mask and raise the weight, or failures that lower it",
    ] = 10

    def recover(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> list[RecoveredTrigger]:
        return self.recover_for(range(len(clean.classes)), model, clean, rng=rng)

    def recover_for(
        self, labels: Sequence[int], model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> list[RecoveredTrigger]:
        """The triggers of some labels only; one label of k takes a k-th of the time."""
        if not labels:
            return []
        classes = torch.tensor(labels).unsqueeze(1)  # [k, 1]
        other = clean.labels != classes  # [k, n]
        predicted = predict(model, clean.images, precision=chosen_precision()).argmax(1)  # [n]
        pool = other & (predicted != classes)  # [k, n]
        masks, patterns = self._search(model, clean, pool, classes.squeeze(1), rng)
        return [
            measure_trigger(label, mask, pattern, model, clean, predicted)
            for label, mask, pattern in zip(labels, masks, patterns)
        ]

    def _search(
        self,
        model: nn.Module,
        clean: ImageSet,
        pool: Bool[Tensor, "k n"],
        labels: Indices,
        rng: torch.Generator,
    ) -> tuple[Float[Tensor, "k h w"], Float[Tensor, "k c h w"]]:
        """The mask and the pattern of each of the k labels.

        It is the smallest mask that was proven on images of the `pool`, else the last one.
        """
        device = device_of(model)
        k = len(pool)
        c, h, w = clean.shape
        network = copy.deepcopy(model).eval().requires_grad_(False)
        sizes = pool.sum(1, keepdim=True)  # [k, 1]
        # Positions, those in the pool first.
        order = pool.int().argsort(dim=1, descending=True, stable=True)  # [k, n]
        targets = labels.to(device).repeat_interleave(self.batch_size)  # [k*b]
        raw_masks = torch.zeros(k, 1, h, w, device=device, requires_grad=True)
        raw_patterns = torch.zeros(k, c, h, w, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([raw_masks, raw_patterns], lr=self.lr, betas=(0.5, 0.9))
        cost = torch.full((k,), self.init_cost, device=device)
        # Successes in a row; failures count below 0.
        streak = torch.zeros(k, dtype=torch.int64, device=device)
        smallest = torch.full((k,), float("inf"), device=device)  # area of the proven masks
        best_masks = torch.zeros_like(raw_masks)
        best_patterns = torch.zeros_like(raw_patterns)
        for _ in range(self.steps):
            ranks = (torch.rand(k, self.batch_size, generator=rng) * sizes).long()
            images = to_floats(clean.images[order.gather(1, ranks)].to(device))  # [k, b, c, h, w]
            masks = (raw_masks.tanh() + 1) / 2
            patterns = (raw_patterns.tanh() + 1) / 2
            triggered = blend(images, masks.unsqueeze(1), patterns.unsqueeze(1))
            with autocast(chosen_precision(), device):
                logits = network(triggered.flatten(0, 1)).float()  # [k*b, classes]
            areas = masks.sum((1, 2, 3))
            error = F.cross_entropy(logits, targets, reduction="sum") / self.batch_size
            optimizer.zero_grad()
            (error + cost @ areas).backward()

            hits = (logits.argmax(1) == targets).view(k, -1).float().mean(1)
            passed = hits >= self.success
            streak = torch.where(passed, streak.clamp_min(0) + 1, streak.clamp_max(0) - 1)
            proven = (streak >= self.patience) & (areas < smallest)
            keep = proven | smallest.isinf()
            best_masks[keep] = masks.detach()[keep]
            best_patterns[keep] = patterns.detach()[keep]
            smallest[proven] = areas.detach()[proven]
            factor = torch.where(passed, self.multiplier, self.multiplier**-1.5)
            cost = torch.where(streak % self.patience == 0, cost * factor, cost)
            optimizer.step()
        return best_masks.squeeze(1).cpu(), best_patterns.cpu()


QUICK = NeuralCleanse(steps=100, lr=0.2, patience=4)
"""A third of the work; the sizes of the masks are nearly final."""
