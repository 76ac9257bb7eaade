"""NC unlearning: find a small trigger for every label, and unlearn those that are abnormally small."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defences.base import Repaired, TuningDefence
from rnp.errors import UserError
from rnp.training import autocast, device_of, predict
from rnp.types import DefenceSet, ImageSet, Indices, OnEpoch, ignore, to_floats

RAISE = 1.5**0.1  # factor on the cost of a mask after a step that succeeds; the power of -1.5 of it after one that fails


@dataclass(frozen=True, kw_only=True)
class NCUnlearn(TuningDefence):
    """Fine-tuning on images of which some carry the triggers found, all under their true labels.

    A label is suspicious when its mask is smaller than the median by `least_index` robust standard deviations. When none
    is, the model is returned as it was, and `on_epoch` hears nothing: the backdoor, if there is one, went undetected.

    Drawn at random: the images of each step, which of them carry which trigger, and their augmentation.

    Source: Wang et al., S&P 2019 (Neural Cleanse), sections IV and VI.C; a fifth of the images stamped, as there.
    Differs: all labels are optimised in one batch, and the cost of a mask moves a little after every step where public code
    moves it by 1.5 after ten; a trigger that moves less than half of the images counts as large as the image; sizes are
    compared by their logarithms, since those of benign labels differ so much that even an empty mask barely reaches an
    index of 2; length of the fine-tuning in steps.
    """

    search_steps: Annotated[int, "optimisation steps of the triggers"] = 300
    search_batch: Annotated[int, "images per label and step of the search"] = 16
    search_lr: Annotated[float, "learning rate of Adam, for masks and patterns"] = 0.1
    init_cost: Annotated[float, "weight of a mask's size at the start"] = 1e-3
    success: Annotated[float, "share of a batch that must reach the label before the weight of the mask's size rises"] = 0.99
    least_index: Annotated[float, "anomaly index above which a label is suspicious"] = 2.0
    stamped: Annotated[float, "share of the images that carry a trigger in fine-tuning"] = 0.2
    steps: Annotated[int, "optimiser steps of the fine-tuning"] = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("search_steps", "search_batch", "search_lr", "init_cost"):
            if not getattr(self, name) > 0:
                raise UserError(f"nc_unlearn.{name} must be above 0, got {getattr(self, name):g}")
        for name in ("success", "stamped"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"nc_unlearn.{name} must be in (0, 1], got {getattr(self, name):g}; it is a fraction")

    def repair(self, model: nn.Module, defence_set: DefenceSet, *, rng: torch.Generator,
               on_epoch: OnEpoch = ignore) -> Repaired:
        tuned, device = copy.deepcopy(model).eval(), device_of(model)
        masks, patterns = self.triggers(tuned, defence_set.train, rng)
        labels = self.suspicious(self.sizes(tuned, defence_set.train, masks, patterns))
        if len(labels) == 0:
            return Repaired(tuned)

        def objective(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
            which = labels[torch.randint(len(labels), (len(images),), generator=rng)]
            carriers = (torch.rand(len(images), 1, 1, 1, generator=rng) < self.stamped).to(device)
            logits = tuned(stamp(images, carriers * masks[which], patterns[which]))
            return F.cross_entropy(logits.float(), truth), logits

        return Repaired(self.tune(tuned, defence_set.train, rng=rng, objective=objective, on_epoch=on_epoch))

    def triggers(self, model: nn.Module, clean: ImageSet,
                 rng: torch.Generator) -> tuple[Float[Tensor, "k 1 h w"], Float[Tensor, "k c h w"]]:
        """For each label the smallest mask, and its pattern, that send images of the other classes there."""
        network, device, k = copy.deepcopy(model).requires_grad_(False), device_of(model), len(clean.classes)
        raw_masks = torch.zeros(k, 1, *clean.shape[1:], device=device, requires_grad=True)
        raw_patterns = torch.zeros(k, *clean.shape, device=device, requires_grad=True)
        optimiser = torch.optim.Adam([raw_masks, raw_patterns], lr=self.search_lr, betas=(0.5, 0.9))
        others = [(clean.labels != label).nonzero().squeeze(1) for label in range(k)]
        targets = torch.arange(k, device=device).repeat_interleave(self.search_batch)
        costs = torch.full((k,), self.init_cost, device=device)
        for _ in range(self.search_steps):
            positions = torch.cat([pool[torch.randint(len(pool), (self.search_batch,), generator=rng)] for pool in others])
            images = to_floats(clean.images[positions].to(device))  # [k*b, c, h, w]
            masks, patterns = (raw_masks.tanh() + 1) / 2, (raw_patterns.tanh() + 1) / 2
            with autocast(self.precision, device):
                stamped = stamp(images, masks[targets], patterns[targets])
                logits = network(stamped.contiguous(memory_format=torch.channels_last)).float()
            loss = F.cross_entropy(logits, targets, reduction="sum") / self.search_batch + costs @ masks.sum((1, 2, 3))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            reached = (logits.argmax(1) == targets).view(k, -1).float().mean(1)
            costs *= torch.where(reached >= self.success, RAISE, RAISE**-1.5)
        return masks.detach(), patterns.detach()

    def sizes(self, model: nn.Module, clean: ImageSet, masks: Float[Tensor, "k 1 h w"],
              patterns: Float[Tensor, "k c h w"]) -> Float[Tensor, "k"]:
        """Area of each mask in pixels; the whole image for one that does not move half of the images of other classes."""
        areas = masks.sum((1, 2, 3)).cpu()
        for label, (mask, pattern) in enumerate(zip(masks.cpu(), patterns.cpu())):
            triggered = stamp(to_floats(clean.images[clean.labels != label]), mask, pattern)
            if (predict(model, triggered, precision=self.precision).argmax(1) == label).float().mean() < 0.5:
                areas[label] = mask.numel()
        return areas

    def suspicious(self, sizes: Float[Tensor, "k"]) -> Indices:
        """The labels far below the median, in logarithms; 1.4826 makes the median deviation that of a Gaussian."""
        sizes = sizes.log()
        below = sizes.quantile(0.5) - sizes
        index = below / (1.4826 * below.abs().quantile(0.5)).clamp_min(1e-6)
        return (index > self.least_index).nonzero().squeeze(1)


def stamp(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """(1 - mask) * images + mask * pattern."""
    return images + mask * (pattern - images)
