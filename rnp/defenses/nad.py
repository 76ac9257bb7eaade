"""NAD: a fine-tuned copy teaches the model where to look, by the attention maps of its stages."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defenses.base import Repaired, TuningDefense
from rnp.errors import UserError
from rnp.types import DefenseSet, Images, Logits, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class NAD(TuningDefense):
    """Neural attention distillation: cross-entropy + beta * squared difference of the attention
    maps.

    The student starts from the victim; the teacher is the victim after plain fine-tuning.

    Source: Li et al., ICLR 2021, section 3; mean over pixels and not the sum, as in the public
    code, to which beta belongs.
    Differs: the maps are those of the last layer at each resolution, so that any architecture with
    feature maps has them; one beta for all, since their number varies (public code: 500, 1000,
    1000); step size and weight decay as in BackdoorBench; half a cosine; length in steps.
    """

    beta: Annotated[float, Ge(0), "weight of the attention maps against the cross-entropy"] = 1000.0
    weight_decay: Annotated[float, "SGD weight decay"] = 1e-4
    teacher_steps: Annotated[
        int, Ge(1), "optimizer steps that make the teacher, by plain fine-tuning"
    ] = 200
    steps: Annotated[int, "optimizer steps of the student"] = 400

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        """`on_epoch` hears of the student only."""
        teacher, student = self.initial_teacher(model, defense_set, rng=rng), copy.deepcopy(model)

        def distil(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                wanted, _ = attention(teacher, images)
            maps, logits = attention(student, images)
            differences = [F.mse_loss(one, other) for one, other in zip(maps, wanted, strict=True)]
            return (
                F.cross_entropy(logits.float(), labels)
                + self.beta * torch.stack(differences).sum(),
                logits,
            )

        self.tune(teacher, defense_set.train, rng=rng, steps=self.teacher_steps)
        return Repaired(
            self.tune(student, defense_set.train, rng=rng, objective=distil, on_epoch=on_epoch)
        )

    def initial_teacher(
        self, model: nn.Module, defense_set: DefenseSet, *, rng: torch.Generator
    ) -> nn.Module:
        """A new network, which fine-tuning makes the teacher: a copy of the victim."""
        return copy.deepcopy(model)


def attention(model: nn.Module, images: Images) -> tuple[list[Float[Tensor, "n _"]], Logits]:
    """One map per resolution, flat and of norm 1: the mean square over the channels of the last
    feature map; and the logits.

    Raises: UserError when no layer puts out a feature map of more than one pixel.
    """
    last: dict[torch.Size, Tensor] = {}
    maps: set[torch.Size] = set()
    channels_last: set[torch.Size] = (
        set()
    )  # sizes that layers seem to put out whose channels come last

    def keep(module: nn.Module, _: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
            last[output.shape[2:]] = output
            if isinstance(module, nn.Linear | nn.LayerNorm):
                channels_last.add(output.shape[2:])
            elif isinstance(module, nn.Conv2d):
                maps.add(output.shape[2:])

    handles = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    last = {shape: output for shape, output in last.items() if shape not in channels_last - maps}
    if not last:
        raise UserError(
            f"no layer of {type(model).__name__} puts out a feature map, and nad compares those;"
            " choose a convolutional architecture"
        )
    return [
        F.normalize(output.float().square().mean(1).flatten(1)) for output in last.values()
    ], logits
