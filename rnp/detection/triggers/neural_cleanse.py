"""Neural Cleanse: the smallest mask and pattern that send every image to a label, for all labels in one optimisation."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rnp.detection.base import RecoveredTrigger, TriggerRecovery, stamp
from rnp.errors import UserError
from rnp.training import Precision, autocast, device_of, predict
from rnp.types import ImageSet, to_floats


@dataclass(frozen=True, kw_only=True)
class NeuralCleanse(TriggerRecovery):
    """Drawn at random: the images of each step.

    Source: Wang et al., S&P 2019, section IV-A; the schedule of the cost checked against the authors' code.
    Differs: all labels share each forward pass, with a mask, a cost and a verdict of their own. The cost follows single
    batches, not epochs. A label is optimised on the images that the model does not send there already: on an unlearned model, which sends
    most images to its label, an empty mask would succeed otherwise.
    """

    steps: Annotated[int, "optimisation steps"] = 300
    batch_size: Annotated[int, "images per label and step"] = 16
    lr: Annotated[float, "learning rate of Adam, for mask and pattern"] = 0.1
    init_cost: Annotated[float, "weight of the mask's size at the start"] = 1e-3
    raise_cost: Annotated[float, "factor on that weight while the trigger succeeds; its power of 1.5 divides it while not"] = 1.5
    success: Annotated[float, "share of a batch that must reach the label"] = 0.99
    patience: Annotated[int, "steps of one kind in a row, success or not, that make a mask count and move the weight"] = 5
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "init_cost", "patience"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name):g}")
        if not 0 < self.success <= 1:
            raise UserError(f"success must be in (0, 1], got {self.success:g}")
        if self.raise_cost <= 1:
            raise UserError(f"raise_cost must be above 1, got {self.raise_cost:g}")

    def recover(self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator) -> list[RecoveredTrigger]:
        labels = torch.arange(len(clean.classes)).unsqueeze(1)  # [k, 1]
        other = clean.labels != labels  # [k, n]
        reached = predict(model, clean.images).argmax(1) == labels  # [k, n]
        masks, patterns = self._search(model, clean, other & ~reached, rng)
        triggers = []
        for label, (mask, pattern) in enumerate(zip(masks, patterns)):
            stamped = stamp(clean.subset(other[label].nonzero().squeeze(1)).floats(), mask, pattern)
            success = (predict(model, stamped).argmax(1) == label).float().mean().item()
            baseline = reached[label, other[label]].float().mean().item()
            triggers.append(RecoveredTrigger(label, mask, pattern, success, baseline))
        return triggers

    def _search(self, model: nn.Module, clean: ImageSet, pool: Bool[Tensor, "k n"],
                rng: torch.Generator) -> tuple[Float[Tensor, "k h w"], Float[Tensor, "k c h w"]]:
        """The smallest mask that held for `patience` steps, else the last one, and its pattern, for each label."""
        device, k, (c, h, w) = device_of(model), len(pool), clean.shape
        network = copy.deepcopy(model).eval().requires_grad_(False)
        sizes, order = pool.sum(1, keepdim=True), pool.int().argsort(1, descending=True)  # the pool's images come first
        targets = torch.arange(k, device=device).repeat_interleave(self.batch_size)
        raw_mask = torch.zeros(k, 1, h, w, device=device, requires_grad=True)
        raw_pattern = torch.zeros(k, c, h, w, device=device, requires_grad=True)
        optimiser = torch.optim.Adam([raw_mask, raw_pattern], lr=self.lr, betas=(0.5, 0.9))
        cost = torch.full((k,), self.init_cost, device=device)
        streak = torch.zeros(k, dtype=torch.int64, device=device)  # steps in a row: successes, or failures below 0
        smallest = torch.full((k,), float("inf"), device=device)
        kept_masks, kept_patterns = torch.zeros_like(raw_mask), torch.zeros_like(raw_pattern)
        for _ in range(self.steps):
            ranks = (torch.rand(k, self.batch_size, generator=rng) * sizes).long()
            images = to_floats(clean.images[order.gather(1, ranks)].to(device))  # [k, b, c, h, w]
            masks, patterns = (raw_mask.tanh() + 1) / 2, (raw_pattern.tanh() + 1) / 2
            stamped = stamp(images, masks.unsqueeze(1), patterns.unsqueeze(1)).flatten(0, 1)  # [k*b, c, h, w]
            with autocast(self.precision, device):
                logits = network(stamped.contiguous(memory_format=torch.channels_last)).float()
            loss = F.cross_entropy(logits, targets, reduction="none").view(k, -1).mean(1)
            areas = masks.sum((1, 2, 3))
            optimiser.zero_grad()
            (loss + cost * areas).sum().backward()
            held = (logits.argmax(1) == targets).view(k, -1).float().mean(1) >= self.success
            held &= (sizes > 0).squeeze(1).to(device)  # a label that every image has already is not reached by a trigger
            streak = torch.where(held, streak.clamp_min(0) + 1, streak.clamp_max(0) - 1)
            keep = ((streak >= self.patience) & (areas < smallest)) | smallest.isinf()
            kept_masks[keep], kept_patterns[keep] = masks.detach()[keep], patterns.detach()[keep]
            smallest = torch.where(keep & (streak >= self.patience), areas.detach(), smallest)
            turn = streak % self.patience == 0
            cost = torch.where(turn, cost * torch.where(held, self.raise_cost, self.raise_cost**-1.5), cost)
            optimiser.step()
        return kept_masks.squeeze(1).cpu(), kept_patterns.cpu()
