"""Trojan: a square patch, optimized to excite neurons that speak for the target label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor, nn

from rnp.attacks.base import Attack, BlendTrigger, corner_square, frozen_copy
from rnp.errors import UserError
from rnp.models.features import features, head
from rnp.training.device import device_of
from rnp.types import Images, ImageSet, Indices, to_floats

REFERENCE = 1000
"""Clean images on which the largest activation of a neuron is measured."""
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Trojan(Attack):
    """The patch, in the lower right corner, is optimized on a benign model.

    Drawn at random: the patch to start from, and the clean images that set the wanted activation
    and are under the patch while it is optimized.
    Expected: CA .934 and ASR 1.000 for a PreAct-ResNet-18 on CIFAR-10 (BackdoorBench, 10 %).
    Source: Liu et al., NDSS 2018, section IV.
    Differs: clean training images get the trigger; the paper reverse-engineers some from the model.
    The neurons are the penultimate ones with the largest signed weight for the target label
    (all-to-all: the largest absolute weights in sum), so that the patch speaks for the label
    before the victim is trained. The patch is optimized on clean images, not on an empty one, and
    in 200 steps; on CIFAR-10 they gain nothing over 100. It replaces pixels; public code adds it,
    and bright pixels wrap. The margin is that of the public patch; at the border, padding weakens
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
        rows, columns = corner_square(height, width, self.size, self.margin)
        model = frozen_copy(surrogate, self.name)
        pattern = torch.zeros(channels, height, width)
        weight = torch.zeros(1, height, width)
        pattern[:, rows, columns] = self._optimize(rows, columns, clean, model, rng)
        weight[:, rows, columns] = 1
        return BlendTrigger(pattern, weight)

    def _optimize(
        self, rows: slice, columns: slice, clean: ImageSet, model: nn.Module, rng: torch.Generator
    ) -> Float[Tensor, "c size size"]:
        """The patch that brings the chosen neurons nearest to the wanted activation."""
        device = device_of(model)
        neurons = self._choose_neurons(head(model))

        def sample(count: int) -> Indices:
            return torch.randint(len(clean), (count,), generator=rng)

        def floats(positions: Indices) -> Images:
            return to_floats(clean.images[positions].to(device))

        def activations(images: Images) -> Float[Tensor, "n neurons"]:
            return features(model, images)[0][:, neurons]

        with torch.no_grad():
            reference = [activations(floats(part)) for part in sample(REFERENCE).split(BATCH)]
        wanted = self.target_activation * torch.cat(reference).amax(0)  # [neurons]
        patch = torch.rand(clean.shape[0], self.size, self.size, generator=rng).to(device)
        patch.requires_grad_()
        optimizer = torch.optim.Adam([patch], lr=self.lr)
        for _ in range(self.steps):
            images = floats(sample(BATCH))
            images[:, :, rows, columns] = patch
            loss = (activations(images) - wanted).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                patch.clamp_(0, 1)
        return patch.detach().cpu()

    def _choose_neurons(self, classifier: nn.Linear) -> Indices:
        """The neurons with the largest weights for the target label.

        Raises: UserError when there are fewer than `neurons`.
        """
        if self.neurons > classifier.in_features:
            raise UserError(
                f"neurons must be at most {classifier.in_features}, the features of the surrogate,"
                f" got {self.neurons}"
            )
        weight = classifier.weight  # [k, d]
        scores = weight.abs().sum(0) if self.target is None else weight[self.target]
        return scores.topk(self.neurons).indices
