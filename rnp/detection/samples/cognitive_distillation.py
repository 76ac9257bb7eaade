"""Cognitive Distillation: a small part of a triggered image preserves the model's output."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector, blend
from rnp.training.device import autocast, chosen_precision, device_of
from rnp.types import Bytes, Images, ImageSet, to_floats


@dataclass(frozen=True, kw_only=True)
class CognitiveDistillation(SampleDetector):
    """The share of an image, in [0, 1], that a mask can hide without changing the logits.

    Hidden pixels have a plain color. Each image is scored by itself.

    Drawn at random: one color per step, the same for all images.

    Source: Huang et al., ICLR 2023, arXiv 2301.10908, eq. 1, on the logits.
    Differs: half as many steps of twice the length, with the same ranking; the weight of the
    mask's size applies to its share of the image, and is the paper's at 32x32 pixels, so that one
    default serves all sizes. Original and masked images are both normalized; public code
    normalizes only the former.
    """

    steps: Annotated[int, Gt(0), "optimization steps"] = 50
    batch_size: Annotated[int, Gt(0), "images that are optimized together"] = 100
    lr: Annotated[float, Gt(0), "learning rate of Adam"] = 0.2
    sparsity: Annotated[float, Gt(0), "weight of the share of the image that is shown"] = 10.0
    smoothness: Annotated[float, Ge(0), "weight of the mask's squared variation"] = 1.0

    def score(
        self,
        model: nn.Module,
        images: Bytes,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        unlearned: nn.Module | None = None,
    ) -> Float[Tensor, "n"]:
        network = copy.deepcopy(model).eval().requires_grad_(False)
        colors = torch.rand(self.steps, images.shape[1], 1, 1, generator=rng)
        masks = [
            self._optimize_masks(network, to_floats(part), colors)
            for part in images.split(self.batch_size)
        ]
        return 1 - torch.cat([part.mean((1, 2, 3)) for part in masks])

    def _optimize_masks(
        self, network: nn.Module, images: Images, colors: Float[Tensor, "t c 1 1"]
    ) -> Float[Tensor, "n 1 h w"]:
        """The mask of each image: 1 shows a pixel, 0 hides it."""
        device = device_of(network)
        images = images.to(device)
        raw = torch.ones(len(images), 1, *images.shape[2:], device=device, requires_grad=True)
        optimizer = torch.optim.Adam([raw], lr=self.lr, betas=(0.1, 0.1))

        def logits(shown: Images) -> Tensor:
            with autocast(chosen_precision(), device):
                return network(shown).float()

        original = logits(images)
        for color in colors.to(device):
            masks = (raw.tanh() + 1) / 2
            change = (logits(blend(color, masks, images)) - original).abs().mean(1)
            size = masks.mean((1, 2, 3))
            loss = change + self.sparsity * size + self.smoothness * variation(masks)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        return ((raw.detach().tanh() + 1) / 2).cpu()


def variation(masks: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n"]:
    """Squared differences between neighboring pixels, summed, per pixel."""
    vertical, horizontal = (masks.diff(dim=axis).square().sum((1, 2, 3)) for axis in (2, 3))
    return (vertical + horizontal) / masks[0].numel()
