"""FT-SAM: fine-tuning that looks for flat minima, which shrinks the large weights of backdoor
neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.func import functional_call

from rnp.defenses.base import Repaired, TuningDefense
from rnp.types import DefenseSet, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class FTSAM(TuningDefense):
    """Each step uses the gradient at the highest loss nearby; distances are relative to weights.

    Drawn at random: the order of the images and their augmentation.

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
        float, Interval(ge=0, lt=1), "fraction of each label that is spread over all classes"
    ] = 0.1
    steps: Annotated[int, Gt(0), "optimizer steps, of two passes each"] = 400

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

        def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = tuned(images)
            loss = smoothed_loss(logits, labels)
            uphill = ascend(weights, torch.autograd.grad(loss, list(weights.values())), self.rho)
            # The second pass works on copies of the statistics, so that it does not change them.
            buffers = {name: value.clone() for name, value in tuned.named_buffers()}
            uphill_logits = functional_call(tuned, uphill | buffers, (images,))
            return smoothed_loss(uphill_logits, labels), logits

        self.tune(tuned, defense_set.train, rng=rng, objective=objective, on_epoch=on_epoch)
        return Repaired(tuned)


def ascend(
    weights: Mapping[str, Tensor], gradients: Sequence[Tensor], rho: float
) -> dict[str, Tensor]:
    """The weights w + e, for the e with |e / w| <= rho that raises the loss most to first order.

    The change e is a constant to autograd.
    """
    norms = [(w.detach() * g).norm() for w, g in zip(weights.values(), gradients)]
    factor = rho / torch.stack(norms).norm().clamp_min(1e-12)
    return {
        name: w + factor * w.detach().square() * g
        for (name, w), g in zip(weights.items(), gradients)
    }
