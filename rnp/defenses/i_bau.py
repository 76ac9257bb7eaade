"""I-BAU: min-max unlearning of a universal perturbation, with implicit hypergradients."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn

from rnp.defenses.base import Defense, Repaired
from rnp.training.device import autocast, chosen_precision, device_of
from rnp.training.loop import Objective, fit
from rnp.types import DefenseSet, Images, ImageSet, Labels, OnEpoch, no_callback, to_floats


@dataclass(frozen=True, kw_only=True)
class IBAU(Defense):
    """Implicit backdoor adversarial unlearning: min over weights, max over one perturbation.

    Each round computes a new perturbation of all images, then passes once over the images, of which
    a fraction carries it under the true label. The gradient includes how the perturbation at its
    maximum changes with the weights, by the implicit function theorem. BatchNorm keeps its
    statistics.

    Drawn at random: the images that the perturbation is computed on, and the order of the images in
    each pass.

    Source: Zeng et al., ICLR 2022, Algorithm 1; fixed-point iterations for the inverse Hessian, as
    in the public code.
    Differs: the public code puts the perturbation on 1 % of a batch, which is no image of a small
    one, and computes it in one pass over the images, here in `inner_steps` steps; the map is
    computed on a part of each batch, since its derivatives cost some twenty passes; more rounds,
    each with fewer steps, since there are fewer images. As in the public code, the map ignores the
    radius, at which the perturbation mostly ends.
    """

    radius: Annotated[
        float,
        Gt(0),
        "largest norm of the perturbation, over all pixels and channels, in units of full scale",
    ] = 10.0
    penalty: Annotated[float, Ge(0), "weight of the squared norm of the perturbation"] = 0.001
    inner_steps: Annotated[
        int, Gt(0), "gradient steps that compute the perturbation, in each round"
    ] = 10
    ascent_lr: Annotated[float, Gt(0), "step size of these gradient steps"] = 10.0
    iterations: Annotated[
        int, Ge(0), "fixed-point iterations of the implicit gradient; 0 takes the first term"
    ] = 5
    inner_step_size: Annotated[
        float, Gt(0), "step size of the map whose fixed point the iterations approximate"
    ] = 0.1
    implicit_batch: Annotated[int, Gt(0), "images of each batch on which that map is computed"] = 16
    perturbed_fraction: Annotated[
        float,
        Interval(gt=0, le=1),
        "fraction of a batch that carries the perturbation, at least one image",
    ] = 0.1
    rounds: Annotated[int, Gt(0), "perturbations, each followed by a pass over the images"] = 10
    lr: Annotated[float, Gt(0), "learning rate of Adam"] = 1e-4
    batch_size: Annotated[int, Gt(0), "images per step"] = 64

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        tuned = copy.deepcopy(model).eval()
        optimizer = torch.optim.Adam(tuned.parameters(), lr=self.lr)
        for index in range(self.rounds):
            noise = self.inner_maximum(tuned, defense_set.train, rng=rng)
            (row,) = fit(
                tuned,
                defense_set.train,
                objective=self.outer_loss(tuned, noise),
                optimizer=optimizer,
                epochs=1,
                rng=rng,
                batch_size=self.batch_size,
                precision=chosen_precision(),
            )
            on_epoch(dataclasses.replace(row, epoch=index, step=(index + 1) * row.step))
        return Repaired(tuned)

    def outer_loss(self, model: nn.Module, noise: Tensor) -> Objective:
        """Cross-entropy on a batch of which a fraction carries `noise`, plus the implicit term."""

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            num_carriers = max(1, round(self.perturbed_fraction * len(labels)))
            carriers = torch.arange(len(labels), device=labels.device) < num_carriers
            logits = model(images + carriers[:, None, None, None] * noise)
            loss = F.cross_entropy(logits.float(), labels)
            part = slice(self.implicit_batch)
            return loss + self.implicit_term(model, images[part], labels[part], noise, loss), logits

        return objective

    def inner_loss(self, model: nn.Module, images: Images, labels: Labels, noise: Tensor) -> Tensor:
        """The value that the perturbation maximizes."""
        loss = F.cross_entropy(model(images + noise).float(), labels)
        return loss - self.penalty * noise.square().sum()

    def inner_maximum(self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator) -> Tensor:
        """The perturbation [1, c, h, w] that raises the loss most; it requires a gradient."""
        device = device_of(model)
        noise = torch.zeros(1, *clean.shape, device=device, requires_grad=True)
        for _ in range(self.inner_steps):
            positions = torch.randint(len(clean), (self.batch_size,), generator=rng)
            images = to_floats(clean.images[positions].to(device))
            labels = clean.labels[positions].to(device)
            with autocast(chosen_precision(), device):
                loss = self.inner_loss(model, images, labels, noise)
            (gradient,) = torch.autograd.grad(loss, noise)
            with torch.no_grad():
                noise += self.ascent_lr * gradient
        with torch.no_grad():
            noise *= (self.radius / noise.norm()).clamp_max(1)
        return noise

    def implicit_term(
        self, model: nn.Module, images: Images, labels: Labels, noise: Tensor, loss: Tensor
    ) -> Tensor:
        """0, with the gradient by which `loss` depends on the weights through the perturbation.

        The perturbation is the fixed point of the map noise + inner_step_size * d inner_loss /
        d noise; `adjoint` is the gradient of the loss with respect to it, summed over all further
        steps of the map.
        """
        (direct,) = torch.autograd.grad(loss, noise, retain_graph=True)
        inner_loss = self.inner_loss(model, images, labels, noise)
        (uphill,) = torch.autograd.grad(inner_loss, noise, create_graph=True)
        step = noise + self.inner_step_size * uphill
        adjoint = direct
        for _ in range(self.iterations):
            adjoint = torch.autograd.grad(step, noise, adjoint, retain_graph=True)[0] + direct
        term = (adjoint * step).sum()
        return term - term.detach()
