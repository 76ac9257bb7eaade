"""Search for rectangles of one color that act as a trigger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from rnp.detection.base import blend
from rnp.training.device import chosen_precision
from rnp.training.predict import predict
from rnp.types import Images

SURVIVORS = 8
"""One of so many rectangles is kept, and changed, in each generation."""
TOGETHER = 16
"""Rectangles that are tried at the same time, which bounds the memory."""


@dataclass(frozen=True)
class Rectangles:
    """Rectangles by their first and last row and column, each of one color.

    One whose last row or column comes before its first has no pixel.
    """

    first: Int64[Tensor, "v 2"]
    last: Int64[Tensor, "v 2"]
    colors: Float[Tensor, "v c"]

    def __len__(self) -> int:
        return len(self.first)

    def take(self, positions: Int64[Tensor, "n"]) -> Rectangles:
        """Those at `positions`."""
        return Rectangles(self.first[positions], self.last[positions], self.colors[positions])

    def join(self, other: Rectangles) -> Rectangles:
        return Rectangles(
            torch.cat([self.first, other.first]),
            torch.cat([self.last, other.last]),
            torch.cat([self.colors, other.colors]),
        )

    def paint(
        self, region: Bool[Tensor, "h w"]
    ) -> tuple[Float[Tensor, "v h w"], Float[Tensor, "v c h w"]]:
        """Masks and patterns; what lies outside of the region is cut off."""
        first, last = self.first.view(-1, 2, 1, 1), self.last.view(-1, 2, 1, 1)
        grid = torch.stack(torch.meshgrid(*map(torch.arange, region.shape), indexing="ij"))
        masks = ((grid >= first) & (grid <= last)).all(1) & region
        return masks.float(), self.colors[:, :, None, None].expand(-1, -1, *region.shape)

    def change(self, rng: torch.Generator) -> Rectangles:
        """Copies of which each side moves by at most a pixel.

        Half of the copies keep their color; a quarter changes it a little, and a quarter takes a
        color whose channels are dark or full.
        """
        first, last = (
            side + torch.randint(-1, 2, side.shape, generator=rng)
            for side in (self.first, self.last)
        )
        shift = 0.3 * (torch.rand(self.colors.shape, generator=rng) - 0.5)
        pure = torch.randint(2, self.colors.shape, generator=rng).float()
        kind = torch.rand(len(self), 1, generator=rng)
        colors = torch.where(kind < 0.25, pure, (self.colors + shift).clamp(0, 1))
        return Rectangles(first, last, torch.where(kind < 0.5, colors, self.colors))


def draw_rectangles(
    region: Bool[Tensor, "h w"], channels: int, count: int, rng: torch.Generator
) -> Rectangles:
    """Rectangles between two pixels of the region.

    A third is white, a third black, and a third of random colors.
    """
    pixels = region.nonzero()
    ends = pixels[torch.randint(len(pixels), (count, 2), generator=rng)]  # [v, 2, 2]
    colors = torch.rand(count, channels, generator=rng)
    colors[0::3], colors[1::3] = 1, 0
    return Rectangles(ends.amin(1), ends.amax(1), colors)


def evolve_rectangles(
    label: int,
    region: Bool[Tensor, "h w"],
    model: nn.Module,
    images: Images,
    *,
    count: int,
    generations: int,
    rng: torch.Generator,
) -> Rectangles:
    """The most successful rectangle of each generation; the first generation is drawn.

    An eighth of each generation, the most successful ones, goes over to the next one, together
    with changed copies, `count` in all; so the same one may be the best twice. A rectangle is the
    more successful, the more probable `label` is on average for the `images` that carry it.
    """
    tried = draw_rectangles(region, images.shape[1], count, rng)
    order = success(label, *tried.paint(region), model, images).argsort(descending=True)
    best = tried.take(order[:1])
    for _ in range(generations):
        survivors = tried.take(order[: max(1, count // SURVIVORS)])
        parents = torch.arange(count - len(survivors)) % len(survivors)
        tried = survivors.join(survivors.take(parents).change(rng))
        order = success(label, *tried.paint(region), model, images).argsort(descending=True)
        best = best.join(tried.take(order[:1]))
    return best


def success(
    label: int,
    masks: Float[Tensor, "v h w"],
    patterns: Float[Tensor, "v c h w"],
    model: nn.Module,
    images: Images,
) -> Float[Tensor, "v"]:
    """The mean probability of `label` for the images, by trigger."""
    means = []
    for mask, pattern in zip(masks.split(TOGETHER), patterns.split(TOGETHER)):
        triggered = blend(images, mask[:, None, None], pattern[:, None])  # [v, n, c, h, w]
        logits = predict(model, triggered.flatten(0, 1), precision=chosen_precision())
        means.append(logits.softmax(1)[:, label].view(len(mask), -1).mean(1))
    return torch.cat(means)
