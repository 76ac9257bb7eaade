"""Trojan: a square patch in the lower right corner, optimised to excite neurons that speak for the
target label.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from rnp.attacks.base import Attack, Mix
from rnp.errors import UserError
from rnp.features import features, head
from rnp.training import device_of
from rnp.types import Images, ImageSet, Indices, to_floats

REFERENCE = 1000  # clean images that tell how active a neuron gets
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Trojan(Attack):
    """Drawn at random: the patch to start from, and the clean images that set the aim and lie
    under the patch.

    Expected: CA .934 and ASR 1.000 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 10 %).
    Source: Liu et al., NDSS 2018, section IV.
    Differs: clean training images are stamped; the paper reverse-engineers some from the model.
    The neurons are the penultimate ones with the largest signed weight for the target label
    (all-to-all: the largest absolute weights in sum), so that the patch speaks for the label
    before the victim is trained. The patch is optimised on clean images, not on an empty one, and
    in 200 steps; on CIFAR-10 they gain nothing over 100. It replaces pixels; public code adds it,
    and bright ones wrap. The margin is that of the public patch; at the border, padding robs it of
    its effect.
    """

    controls = (
        "the poisoned share of the training data with their labels, and a benign model to make the"
        " trigger on"
    )

    size: Annotated[int, "side of the patch, in pixels"] = 3
    margin: Annotated[int, "pixels between patch and border"] = 4
    neurons: Annotated[int, "penultimate neurons to excite"] = 2
    excitement: Annotated[
        float, "activation aimed at, in multiples of the neuron's largest on clean images"
    ] = 10
    steps: Annotated[int, "optimisation steps"] = 200
    lr: Annotated[float, "learning rate of Adam, for pixels in [0, 1]"] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("neurons", "excitement", "steps", "lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name):g}")

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Mix:
        channels, height, width = clean.shape
        reach = self.size + self.margin
        if not 1 <= self.size <= reach <= min(height, width):
            raise UserError(
                f"a patch of size {self.size} with margin {self.margin} does not fit"
                f" {height}x{width} images"
            )
        if surrogate is None:
            raise UserError(
                "trojan optimises its patch on a benign model and was given none; pass a surrogate"
            )
        square = (
            ...,
            slice(height - reach, height - self.margin),
            slice(width - reach, width - self.margin),
        )
        pattern, weight = torch.zeros(channels, height, width), torch.zeros(1, height, width)
        pattern[square] = self._optimise(
            square, clean, copy.deepcopy(surrogate).eval().requires_grad_(False), rng
        )
        weight[square] = 1
        return Mix(pattern, weight)

    def _optimise(
        self, square: tuple, clean: ImageSet, network: nn.Module, rng: torch.Generator
    ) -> Tensor:
        """The patch [c, size, size] that brings the chosen neurons nearest to their aim, by
        squared error.
        """
        device, chosen = device_of(network), self._choose_neurons(head(network))

        def sample(count: int) -> Indices:
            return torch.randint(len(clean), (count,), generator=rng)

        def floats(positions: Indices) -> Images:
            return to_floats(clean.images[positions].to(device))

        with torch.no_grad():
            calm = torch.cat(
                [
                    features(network, part)[0][:, chosen]
                    for part in map(floats, sample(REFERENCE).split(BATCH))
                ]
            )
        aim = self.excitement * calm.amax(0)  # [neurons]
        patch = (
            torch.rand(clean.shape[0], self.size, self.size, generator=rng)
            .to(device)
            .requires_grad_()
        )
        optimiser = torch.optim.Adam([patch], lr=self.lr)
        for _ in range(self.steps):
            images = floats(sample(BATCH))
            images[square] = patch
            loss = (features(network, images)[0][:, chosen] - aim).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                patch.clamp_(0, 1)
        return patch.detach().cpu()

    def _choose_neurons(self, classifier: nn.Linear) -> Indices:
        if self.neurons > classifier.in_features:
            raise UserError(
                f"neurons must be at most {classifier.in_features}, the features of the surrogate,"
                f" got {self.neurons}"
            )
        weight = classifier.weight  # [k, d]
        return (
            (weight.abs().sum(0) if self.target is None else weight[self.target])
            .topk(self.neurons)
            .indices
        )
