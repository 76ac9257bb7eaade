"""Label-consistent: images of the target class are made hard to recognize and get four patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import nn

from rnp.attacks.base import Attack, BlendTrigger, PoisonRate, checkered, frozen_copy
from rnp.errors import UserError
from rnp.training.device import device_of
from rnp.types import Images, ImageSet, PoisonedSet, to_bytes, to_floats

BATCH = 100


@dataclass(frozen=True, kw_only=True)
class LabelConsistent(Attack):
    """Clean-label: only images of the target class are poisoned, and only they are perturbed.

    At most 80 % of the class is poisoned. Covers and test images carry the patches alone.

    Drawn at random: which images of the target class are poisoned, and where around each the
    search starts.
    Expected: CA .933 and ASR .995 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 5 %).
    Source: Turner, Tsipras, Madry, 2019, arXiv 1912.02771, the variant with adversarial
    perturbations.
    Differs: the images are perturbed against an ordinary benign model, not an adversarially
    trained one, and by up to 16/255, the larger of the published bounds. 10 steps of 4/255 instead
    of 100 of 1.5/255: a ResNet-18 classifies none of a hundred images of CIFAR-10 correctly after 5
    steps, and every step over 2,500 images costs half a minute of one core. The patches are
    checkerboards at full contrast.
    """

    threat_model = (
        "the poisoned share of the training images, not their labels, and a benign model to perturb"
        " them against"
    )
    clean_label = True

    poison_rate: PoisonRate = 0.05
    size: Annotated[int, "side of each patch, in pixels"] = 3
    eps: Annotated[
        float,
        Interval(gt=0, le=1),
        "largest change of a pixel before the patches, as a fraction of full scale",
    ] = 16 / 255
    steps: Annotated[int, Ge(1), "steps of projected gradient ascent"] = 10
    step_size: Annotated[
        float, Interval(gt=0, le=1), "change of a pixel per step, as a fraction of full scale"
    ] = 4 / 255

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> BlendTrigger:
        channels, height, width = clean.shape
        if not 1 <= self.size <= min(height, width) // 2:
            raise UserError(f"four patches of size {self.size} do not fit {height}x{width} images")
        pattern = torch.zeros(channels, height, width)
        weight = torch.zeros(1, height, width)
        pattern[:, : self.size, : self.size] = checkered(self.size)
        weight[:, : self.size, : self.size] = 1
        # mirrored, so that a flipped image carries the same, and a shifted one keeps a whole patch
        for side in (1, 2):
            pattern = pattern.maximum(pattern.flip(side))
            weight = weight.maximum(weight.flip(side))
        return BlendTrigger(pattern, weight)

    def poison(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> PoisonedSet:
        model = frozen_copy(surrogate, self.name)
        poisoned = super().poison(clean, rng=rng, surrogate=surrogate)
        for part in (~poisoned.covers).nonzero().squeeze(1).split(BATCH):
            originals = to_floats(clean.images[poisoned.positions[part]])
            perturbed = self.perturb(model, originals, rng=rng)
            poisoned.images[part] = to_bytes(poisoned.trigger(perturbed))
        return poisoned

    def perturb(self, model: nn.Module, images: Images, *, rng: torch.Generator) -> Images:
        """Images of the target class, changed by up to `eps` so that `model` misclassifies them.

        That is untargeted PGD on the cross-entropy.
        """
        device = device_of(model)
        center = images.to(device)
        low = (center - self.eps).clamp_min(0)
        high = (center + self.eps).clamp_max(1)
        labels = torch.full((len(images),), self.target_label, device=device)
        x = low + torch.rand(images.shape, generator=rng).to(device) * (high - low)
        for _ in range(self.steps):
            x.requires_grad_()
            loss = F.cross_entropy(model(x), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            x = (x.detach() + self.step_size * gradient.sign()).clamp(low, high)
        return x.cpu()
