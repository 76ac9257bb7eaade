"""Cognitive Distillation: of a triggered image, little must be shown to leave what the model says
unchanged.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.detection.base import SampleDetector, stamp
from rnp.errors import UserError
from rnp.training import Precision, autocast, device_of
from rnp.types import Bytes, Images, ImageSet, to_floats


@dataclass(frozen=True, kw_only=True)
class CognitiveDistillation(SampleDetector):
    """The share of an image, in [0, 1], that a mask can hide behind plain colours without a change
    of the logits.

    Drawn at random: one colour per step, the same for all images, so that no score depends on its
    neighbours.

    Source: Huang et al., ICLR 2023, arXiv 2301.10908, eq. 1, on the logits.
    Differs: half as many steps of twice the length, which rank alike; the weight of the mask's
    size is that of its share of the image, the paper's at 32x32 pixels, so that one default serves
    all sizes. Original and masked images take the same way through the model; public code
    normalises only the former.
    """

    steps: Annotated[int, "optimisation steps"] = 50
    batch_size: Annotated[int, "images that are optimised side by side"] = 100
    lr: Annotated[float, "learning rate of Adam"] = 0.2
    sparsity: Annotated[float, "weight of the share of the image that is shown"] = 10.0
    smoothness: Annotated[float, "weight of the mask's squared variation"] = 1.0
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = (
        "auto"
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "sparsity"):
            if not getattr(self, name) > 0:
                raise UserError(
                    f"cognitive_distillation.{name} must be above 0, got {getattr(self, name):g}"
                )
        if self.smoothness < 0:
            raise UserError(
                f"cognitive_distillation.smoothness must be 0 or more, got {self.smoothness:g}"
            )

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
        colours = torch.rand(self.steps, images.shape[1], 1, 1, generator=rng)
        return torch.cat(
            [
                1 - self._masks(network, to_floats(part), colours).mean((1, 2, 3))
                for part in images.split(self.batch_size)
            ]
        )

    def _masks(
        self, network: nn.Module, images: Images, colours: Float[Tensor, "t c 1 1"]
    ) -> Float[Tensor, "n 1 h w"]:
        """Where each image is shown: 1 shows a pixel, 0 hides it."""
        device = device_of(network)
        images = images.to(device)
        raw = torch.ones(len(images), 1, *images.shape[2:], device=device, requires_grad=True)
        optimiser = torch.optim.Adam([raw], lr=self.lr, betas=(0.1, 0.1))

        def logits(shown: Images) -> Tensor:
            with autocast(self.precision, device):
                return network(shown).float()

        wanted = logits(images)
        for colour in colours.to(device):
            masks = (raw.tanh() + 1) / 2
            change = (logits(stamp(colour, masks, images)) - wanted).abs().mean(1)
            loss = (
                change + self.sparsity * masks.mean((1, 2, 3)) + self.smoothness * variation(masks)
            )
            optimiser.zero_grad()
            loss.sum().backward()
            optimiser.step()
        return ((raw.detach().tanh() + 1) / 2).cpu()


def variation(masks: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n"]:
    """Squared differences between neighbouring pixels, summed, per pixel."""
    return sum(masks.diff(dim=axis).square().sum((1, 2, 3)) for axis in (2, 3)) / masks[0].numel()
