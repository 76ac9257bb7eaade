"""FT-SAM: fine-tuning that looks for flat minima, which shrinks the large weights of backdoor
neurons.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.func import functional_call

from rnp.defenses.base import Repaired, TuningDefense
from rnp.types import DefenseSet, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class FTSAM(TuningDefense):
    """Each step takes the gradient where the loss is highest nearby, with distance counted
    relative to each weight.

    Source: Zhu et al., ICCV 2023, section 4; rho, label smoothing and learning rate as in
    BackdoorBench.
    Differs: length in steps, half as many as plain fine-tuning, since each takes two passes.
    BatchNorm statistics follow the first pass only, that of the weights themselves.
    """

    rho: Annotated[
        float,
        Ge(0),
        "radius of the neighborhood: norm of the change over the weight, taken over all weights",
    ] = 2.0
    label_smoothing: Annotated[
        float, Interval(ge=0, lt=1), "share of each label spread over all classes"
    ] = 0.1
    steps: Annotated[int, "optimizer steps, of two passes each"] = 400

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        tuned = copy.deepcopy(model)
        weights = dict(tuned.named_parameters())

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = tuned(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
            uphill = ascend(weights, torch.autograd.grad(loss, list(weights.values())), self.rho)
            scratch = {
                name: value.clone() for name, value in tuned.named_buffers()
            }  # the second pass moves no statistics
            logits_uphill = functional_call(tuned, uphill | scratch, (images,))
            return (
                F.cross_entropy(
                    logits_uphill.float(), labels, label_smoothing=self.label_smoothing
                ),
                logits,
            )

        return Repaired(
            self.tune(tuned, defense_set.train, rng=rng, objective=objective, on_epoch=on_epoch)
        )


def ascend(
    weights: dict[str, Tensor], gradients: tuple[Tensor, ...], rho: float
) -> dict[str, Tensor]:
    """w + e with the e that, to first order, raises the loss most among all with |e / w| <= rho; a
    constant to autograd.
    """
    steepest = torch.stack(
        [(w.detach() * g).norm() for w, g in zip(weights.values(), gradients)]
    ).norm()
    factor = rho / steepest.clamp_min(1e-12)
    return {
        name: w + factor * w.detach().square() * g
        for (name, w), g in zip(weights.items(), gradients)
    }
