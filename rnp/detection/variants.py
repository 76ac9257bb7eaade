"""Other triggers in the place of a recovered one."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval, MinLen
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rnp.detection.base import RecoveredTrigger, blend, measure_trigger
from rnp.detection.rectangles import evolve_rectangles
from rnp.params.ranges import Hyperparameters
from rnp.training.device import autocast, chosen_precision, device_of
from rnp.training.predict import predict
from rnp.types import ImageSet, to_floats

BRIGHT = 2.0
"""Raw value of a pattern that starts nearly white; its negative is nearly black."""


@dataclass(frozen=True, kw_only=True)
class VariantSearch(Hyperparameters):
    """Search for other triggers of the same label, in the region of a recovered one.

    A recovered trigger is one of many that a backdoor answers to, and seldom the one that was
    planted: a network that has learned to ignore it may still obey a white square in the same
    place. Gradient descent starts from white, from black and from noise, once with each of `costs`.
    Besides, rectangles of one color are drawn, and the most successful ones are changed, over
    some generations (`evolve_rectangles`): a network that has been trained against recovered
    triggers has no gradient that leads to them.

    Drawn at random: the noise, the images of each step, the rectangles and their changes, and the
    images on which success is measured.

    Source: the loss is that of Neural Cleanse (Wang et al., S&P 2019, section IV); the rest is
    ours.
    """

    costs: Annotated[
        tuple[Annotated[float, Ge(0)], ...],
        MinLen(1),
        "weights of the mask's size; each gives three variants",
    ] = (0.003, 0.03, 0.1)
    steps: Annotated[int, Gt(0), "optimization steps"] = 40
    batch_size: Annotated[int, Gt(0), "images per variant and step"] = 16
    lr: Annotated[float, Gt(0), "learning rate of Adam, for mask and pattern"] = 0.3
    edge: Annotated[
        float,
        Interval(gt=0, lt=1),
        "the region is where the mask exceeds this share of its maximum, and around",
    ] = 0.25
    margin: Annotated[int, Ge(0), "pixels around, which belong to the region too"] = 3
    rectangles: Annotated[int, Gt(0), "rectangles in a generation"] = 96
    generations: Annotated[
        int, Ge(0), "generations after the drawn one; the best rectangle of each is a variant"
    ] = 3
    judging: Annotated[int, Gt(0), "images on which success is measured, at most"] = 128

    def __call__(
        self,
        known: RecoveredTrigger,
        model: nn.Module,
        clean: ImageSet,
        *,
        rng: torch.Generator,
    ) -> list[RecoveredTrigger]:
        """Three variants per cost, and then the rectangles; `model` is left unchanged."""
        region = self.region(known.mask)
        masks, patterns = self._descend(known.label, region, model, clean, rng)
        others = clean.subset((clean.labels != known.label).nonzero().flatten())
        rectangles = evolve_rectangles(
            known.label,
            region,
            model,
            random_part(others, self.batch_size, rng).as_floats(),
            count=self.rectangles,
            generations=self.generations,
            rng=rng,
        )
        more_masks, more_patterns = rectangles.paint(region)
        return measure_triggers(
            known.label,
            torch.cat([masks, more_masks]),
            torch.cat([patterns, more_patterns]),
            model,
            random_part(clean, self.judging, rng),
        )

    def region(self, mask: Float[Tensor, "h w"]) -> Bool[Tensor, "h w"]:
        """The pixels in which variants may lie."""
        core = (mask > self.edge * mask.max()).float()
        side = 2 * self.margin + 1
        return F.max_pool2d(core[None, None], side, stride=1, padding=self.margin)[0, 0] > 0

    def _descend(
        self,
        label: int,
        region: Bool[Tensor, "h w"],
        model: nn.Module,
        clean: ImageSet,
        rng: torch.Generator,
    ) -> tuple[Float[Tensor, "v h w"], Float[Tensor, "v c h w"]]:
        device = device_of(model)
        network = copy.deepcopy(model).eval().requires_grad_(False)
        others = (clean.labels != label).nonzero().flatten()
        region = region.to(device)
        costs = torch.tensor(self.costs, device=device).repeat_interleave(3)
        count = len(costs)
        starts = 2 * BRIGHT * torch.rand(count, *clean.shape, generator=rng) - BRIGHT
        starts[0::3], starts[1::3] = BRIGHT, -BRIGHT
        raw_patterns = starts.to(device).requires_grad_()
        raw_masks = torch.zeros(count, 1, *clean.shape[1:], device=device, requires_grad=True)
        optimizer = torch.optim.Adam([raw_masks, raw_patterns], lr=self.lr)
        targets = torch.full((count * self.batch_size,), label, device=device)
        for _ in range(self.steps):
            draw = torch.randint(len(others), (self.batch_size,), generator=rng)
            images = to_floats(clean.images[others[draw]].to(device))  # [b, c, h, w]
            masks = raw_masks.sigmoid() * region
            triggered = blend(images, masks.unsqueeze(1), raw_patterns.sigmoid().unsqueeze(1))
            with autocast(chosen_precision(), device):
                logits = network(triggered.flatten(0, 1)).float()
            error = F.cross_entropy(logits, targets, reduction="sum") / self.batch_size
            optimizer.zero_grad()
            (error + costs @ masks.sum((1, 2, 3))).backward()
            optimizer.step()
        masks = (raw_masks.detach().sigmoid() * region).squeeze(1)
        return masks.cpu(), raw_patterns.detach().sigmoid().cpu()


def random_part(clean: ImageSet, n: int, rng: torch.Generator) -> ImageSet:
    """`n` random images of `clean`, or all."""
    order = torch.randperm(len(clean), generator=rng)[:n]
    return ImageSet(clean.images[order], clean.labels[order], clean.classes)


def measure_triggers(
    label: int,
    masks: Float[Tensor, "v h w"],
    patterns: Float[Tensor, "v c h w"],
    model: nn.Module,
    clean: ImageSet,
) -> list[RecoveredTrigger]:
    """Triggers for `label`, with their success and baseline on `clean`."""
    predicted = predict(model, clean.images, precision=chosen_precision()).argmax(1)
    return [
        measure_trigger(label, mask, pattern, model, clean, predicted)
        for mask, pattern in zip(masks, patterns)
    ]
