"""Neural Cleanse: the smallest mask and pattern that send all images to a label, for all labels at
once.
"""

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
    """The mask that is kept is the smallest of many that passed, so its success on all images lies
    some points lower.

    Drawn at random: the images of each step.

    Source: Wang et al., S&P 2019, section IV; optimizer and factors on the cost as in
    backdoor-toolbox.
    Differs: all labels share each forward pass, every one with a mask, a cost and a success of its
    own. Single batches move the cost, not epochs. A label is optimized on the images that the
    model does not send there already, so that success is success over the baseline: an unlearned
    model, which sends most images to its label, would else be content with an empty mask.
    """

    steps: Annotated[int, Gt(0), "optimization steps"] = 300
    batch_size: Annotated[int, Gt(0), "images per label and step"] = 16
    lr: Annotated[float, Gt(0), "learning rate of Adam, for mask and pattern"] = 0.1
    init_cost: Annotated[float, Gt(0), "weight of the mask's size at the start"] = 1e-3
    multiplier: Annotated[
        float, Gt(1), "factor that raises that weight; it is lowered by the power of 1.5 of it"
    ] = 1.5
    success: Annotated[
        float, Interval(gt=0, le=1), "share of a batch that must reach the label"
    ] = 0.99
    patience: Annotated[
        int,
        Gt(0),
        "successes in a row that prove a mask and raise the weight, failures that lower it",
    ] = 10

    def recover(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> list[RecoveredTrigger]:
        return self.recover_for(range(len(clean.classes)), model, clean, rng=rng)

    def recover_for(
        self, labels: Sequence[int], model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> list[RecoveredTrigger]:
        """The triggers of some labels alone; one costs a k-th of all."""
        classes = torch.tensor(labels).unsqueeze(1)  # [k, 1]
        other = clean.labels != classes  # [k, n]
        before = predict(model, clean.images, precision=chosen_precision()).argmax(1)  # [n]
        masks, patterns = self._search(
            model, clean, other & (before != classes), classes.squeeze(1), rng
        )
        return [
            measure_trigger(*found, model, clean, before, chosen_precision())
            for found in zip(labels, masks, patterns)
        ]

    def _search(
        self,
        model: nn.Module,
        clean: ImageSet,
        pool: Bool[Tensor, "k n"],
        labels: Indices,
        rng: torch.Generator,
    ) -> tuple[Float[Tensor, "k h w"], Float[Tensor, "k c h w"]]:
        """For each of the k labels its smallest mask proven on images of the `pool`, else the last
        one, and its pattern.
        """
        device, k, (c, h, w) = device_of(model), len(pool), clean.shape
        network = copy.deepcopy(model).eval().requires_grad_(False)
        sizes = pool.sum(1, keepdim=True)  # [k, 1]
        order = pool.int().argsort(
            dim=1, descending=True, stable=True
        )  # [k, n], positions in the pool first
        targets = labels.to(device).repeat_interleave(self.batch_size)
        raw_masks = torch.zeros(k, 1, h, w, device=device, requires_grad=True)
        raw_patterns = torch.zeros(k, c, h, w, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([raw_masks, raw_patterns], lr=self.lr, betas=(0.5, 0.9))
        cost = torch.full((k,), self.init_cost, device=device)
        streak = torch.zeros(
            k, dtype=torch.int64, device=device
        )  # successes in a row; failures count below 0
        smallest = torch.full((k,), float("inf"), device=device)  # area of the smallest proven mask
        kept_masks, kept_patterns = torch.zeros_like(raw_masks), torch.zeros_like(raw_patterns)
        for _ in range(self.steps):
            ranks = (torch.rand(k, self.batch_size, generator=rng) * sizes).long()
            images = to_floats(clean.images[order.gather(1, ranks)].to(device))  # [k, b, c, h, w]
            masks, patterns = (raw_masks.tanh() + 1) / 2, (raw_patterns.tanh() + 1) / 2
            stamped = blend(images, masks.unsqueeze(1), patterns.unsqueeze(1)).flatten(
                0, 1
            )  # [k*b, c, h, w]
            with autocast(chosen_precision(), device):
                logits = network(stamped).float()
            areas = masks.sum((1, 2, 3))
            loss = (
                F.cross_entropy(logits, targets, reduction="sum") / self.batch_size + cost @ areas
            )
            optimizer.zero_grad()
            loss.backward()

            held = (logits.argmax(1) == targets).view(k, -1).float().mean(1) >= self.success
            streak = torch.where(held, streak.clamp_min(0) + 1, streak.clamp_max(0) - 1)
            proven = (streak >= self.patience) & (areas < smallest)
            keep = proven | smallest.isinf()
            kept_masks[keep], kept_patterns[keep] = masks.detach()[keep], patterns.detach()[keep]
            smallest[proven] = areas.detach()[proven]
            turn = torch.where(held, self.multiplier, self.multiplier**-1.5)
            cost = torch.where(streak % self.patience == 0, cost * turn, cost)
            optimizer.step()
        return kept_masks.squeeze(1).cpu(), kept_patterns.cpu()
