"""I-BAU: unlearn the perturbation that fools the model on all images, and foresee how it will
answer.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp.defences.base import Defence, Repaired
from rnp.errors import UserError
from rnp.training import Precision, autocast, device_of, fit
from rnp.types import DefenceSet, Images, ImageSet, Labels, OnEpoch, ignore, to_floats


@dataclass(frozen=True, kw_only=True)
class IBAU(Defence):
    """Implicit backdoor adversarial unlearning: min over weights, max over one perturbation of all
    images.

    Each round finds the perturbation anew, then passes once over the images, a share of which
    carries it under the true label. The gradient counts in how the perturbation at its maximum
    moves with the weights, by the implicit function theorem. BatchNorm keeps its statistics.

    Drawn at random: the images of the search and the order of the others.

    Source: Zeng et al., ICLR 2022, Algorithm 1; fixed-point iterations for the inverse Hessian, as
    in the public code.
    Differs: the public code puts the perturbation on 1 % of a batch, which is no image of a small
    one, and finds it in one pass over the images, here in `ascent` steps; the map is computed on a
    part of each batch, since its derivatives cost some twenty passes; more rounds, each with fewer
    steps, since there are fewer images. As there, the map knows nothing of the radius, at which
    the search mostly ends.
    """

    radius: Annotated[
        float,
        "largest norm of the perturbation, over all pixels and channels, in units of full scale",
    ] = 10.0
    penalty: Annotated[float, "weight of the squared norm of the perturbation"] = 0.001
    ascent: Annotated[int, "steps that look for the perturbation, in each round"] = 10
    ascent_lr: Annotated[float, "step size of that search"] = 10.0
    iterations: Annotated[
        int, "fixed-point iterations of the implicit gradient; 0 takes the first term"
    ] = 5
    contraction: Annotated[
        float, "step size of the map whose fixed point the iterations follow"
    ] = 0.1
    implicit_batch: Annotated[int, "images of each batch on which that map is computed"] = 16
    share: Annotated[
        float, "share of a batch that carries the perturbation, at least one image"
    ] = 0.1
    rounds: Annotated[int, "perturbations, each followed by a pass over the images"] = 10
    lr: Annotated[float, "learning rate of Adam"] = 1e-4
    batch_size: Annotated[int, "images per step"] = 64
    precision: Annotated[Precision, "arithmetic; auto takes bf16 where the hardware has it"] = (
        "auto"
    )

    def __post_init__(self) -> None:
        for name in (
            "radius",
            "ascent",
            "ascent_lr",
            "contraction",
            "implicit_batch",
            "rounds",
            "lr",
            "batch_size",
        ):
            if not getattr(self, name) > 0:
                raise UserError(f"i_bau.{name} must be above 0, got {getattr(self, name):g}")
        for name in ("penalty", "iterations"):
            if getattr(self, name) < 0:
                raise UserError(f"i_bau.{name} must be 0 or more, got {getattr(self, name):g}")
        if not 0 < self.share <= 1:
            raise UserError(
                f"i_bau.share must be in (0, 1], got {self.share:g}; it is a fraction, not percent"
            )

    def repair(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
    ) -> Repaired:
        tuned = copy.deepcopy(model).eval()
        optimiser = torch.optim.Adam(tuned.parameters(), lr=self.lr)
        for index in range(self.rounds):
            noise = self.worst(tuned, defence_set.train, rng)

            def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
                carriers = torch.arange(len(labels), device=labels.device) < max(
                    1, round(self.share * len(labels))
                )
                logits = tuned(images + carriers[:, None, None, None] * noise)
                loss = F.cross_entropy(logits.float(), labels)
                few = slice(self.implicit_batch)
                return loss + self.response(tuned, images[few], labels[few], noise, loss), logits

            (row,) = fit(
                tuned,
                defence_set.train,
                objective=objective,
                optimiser=optimiser,
                epochs=1,
                rng=rng,
                batch_size=self.batch_size,
                precision=self.precision,
            )
            on_epoch(dataclasses.replace(row, epoch=index, step=(index + 1) * row.step))
        return Repaired(tuned)

    def harm(self, model: nn.Module, images: Images, labels: Labels, noise: Tensor) -> Tensor:
        """What the perturbation maximises."""
        return (
            F.cross_entropy(model(images + noise).float(), labels)
            - self.penalty * noise.square().sum()
        )

    def worst(self, model: nn.Module, clean: ImageSet, rng: torch.Generator) -> Tensor:
        """The perturbation [1, c, h, w] that raises the loss most; it asks for gradients."""
        device = device_of(model)
        noise = torch.zeros(1, *clean.shape, device=device, requires_grad=True)
        for _ in range(self.ascent):
            positions = torch.randint(len(clean), (self.batch_size,), generator=rng)
            images, labels = (
                to_floats(clean.images[positions].to(device)),
                clean.labels[positions].to(device),
            )
            with autocast(self.precision, device):
                harm = self.harm(model, images, labels, noise)
            (gradient,) = torch.autograd.grad(harm, noise)
            with torch.no_grad():
                noise += self.ascent_lr * gradient
        with torch.no_grad():
            noise *= (self.radius / noise.norm()).clamp_max(1)
        return noise

    def response(
        self, model: nn.Module, images: Images, labels: Labels, noise: Tensor, loss: Tensor
    ) -> Tensor:
        """0, whose gradient is the part of the loss's gradient that flows through the perturbation.

        The perturbation is the fixed point of the map noise + contraction * d harm / d noise;
        `pull` is the loss's gradient with respect to it, summed over all further steps of the map.
        """
        (direct,) = torch.autograd.grad(loss, noise, retain_graph=True)
        (uphill,) = torch.autograd.grad(
            self.harm(model, images, labels, noise), noise, create_graph=True
        )
        step = noise + self.contraction * uphill
        pull = direct
        for _ in range(self.iterations):
            pull = torch.autograd.grad(step, noise, pull, retain_graph=True)[0] + direct
        flow = (pull * step).sum()
        return flow - flow.detach()
