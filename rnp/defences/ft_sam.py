"""FT-SAM: fine-tuning that looks for flat minima, which shrinks the large weights of backdoor
neurons.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from rnp.defences.base import Repaired, TuningDefence
from rnp.errors import UserError
from rnp.types import DefenceSet, OnEpoch, ignore


@dataclass(frozen=True, kw_only=True)
class FTSAM(TuningDefence):
    """Each step takes the gradient where the loss is highest nearby, with distance counted
    relative to each weight.

    Source: Zhu et al., ICCV 2023, section 4; rho, label smoothing and learning rate as in
    BackdoorBench.
    Differs: length in steps, half as many as plain fine-tuning, since each takes two passes.
    BatchNorm statistics follow the first pass only, that of the weights themselves.
    """

    rho: Annotated[
        float,
        "radius of the neighbourhood: norm of the change over the weight, taken over all weights",
    ] = 2.0
    label_smoothing: Annotated[float, "share of each label spread over all classes"] = 0.1
    steps: Annotated[int, "optimiser steps, of two passes each"] = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rho < 0:
            raise UserError(
                f"ft_sam.rho must be 0 or more, got {self.rho:g}; 0 is plain fine-tuning"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"ft_sam.label_smoothing must be in [0, 1), got {self.label_smoothing:g}"
            )

    def repair(
        self,
        model: nn.Module,
        defence_set: DefenceSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = ignore,
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
            self.tune(tuned, defence_set.train, rng=rng, objective=objective, on_epoch=on_epoch)
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
