"""Trojan: a square patch in the lower right corner, optimized to excite neurons that speak for the
target label.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from rnp.attacks.base import Attack, BlendTrigger
from rnp.errors import UserError
from rnp.models.features import features, head
from rnp.training.device import device_of
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
    before the victim is trained. The patch is optimized on clean images, not on an empty one, and
    in 200 steps; on CIFAR-10 they gain nothing over 100. It replaces pixels; public code adds it,
    and bright ones wrap. The margin is that of the public patch; at the border, padding robs it of
    its effect.
    """

    threat_model = (
        "the poisoned share of the training data with their labels, and a benign model to make the"
        " trigger on"
    )

    size: Annotated[int, "side of the patch, in pixels"] = 3
    margin: Annotated[int, "pixels between patch and border"] = 4
    neurons: Annotated[int, Gt(0), "penultimate neurons to excite"] = 2
    target_activation: Annotated[
        float, Gt(0), "activation aimed at, in multiples of the neuron's largest on clean images"
    ] = 10
    steps: Annotated[int, Gt(0), "optimization steps"] = 200
    lr: Annotated[float, Gt(0), "learning rate of Adam, for pixels in [0, 1]"] = 0.1

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> BlendTrigger:
        channels, height, width = clean.shape
        reach = self.size + self.margin
        if not 1 <= self.size <= reach <= min(height, width):
            raise UserError(
                f"a patch of size {self.size} with margin {self.margin} does not fit"
                f" {height}x{width} images"
            )
        if surrogate is None:
            raise UserError(
                "trojan optimizes its patch on a benign model and was given none; pass a surrogate"
            )
        square = (
            ...,
            slice(height - reach, height - self.margin),
            slice(width - reach, width - self.margin),
        )
        pattern, weight = torch.zeros(channels, height, width), torch.zeros(1, height, width)
        pattern[square] = self._optimize(
            square, clean, copy.deepcopy(surrogate).eval().requires_grad_(False), rng
        )
        weight[square] = 1
        return BlendTrigger(pattern, weight)

    def _optimize(
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
        aim = self.target_activation * calm.amax(0)  # [neurons]
        patch = (
            torch.rand(clean.shape[0], self.size, self.size, generator=rng)
            .to(device)
            .requires_grad_()
        )
        optimizer = torch.optim.Adam([patch], lr=self.lr)
        for _ in range(self.steps):
            images = floats(sample(BATCH))
            images[square] = patch
            loss = (features(network, images)[0][:, chosen] - aim).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
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
