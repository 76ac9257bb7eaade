"""NAD: a fine-tuned copy teaches the model through the attention maps of its stages."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defenses.base import Repaired, TuningDefense
from rnp.errors import UserError
from rnp.types import DefenseSet, Images, Logits, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class NAD(TuningDefense):
    """Neural attention distillation: cross-entropy + beta * squared difference of attention maps.

    The student starts from the given model; the teacher is the given model after plain fine-tuning.

    Drawn at random: the order of the images and their augmentation, first for the teacher, then
    for the student.

    Source: Li et al., ICLR 2021, section 3; mean over pixels and not the sum, as in the public
    code, to which beta belongs.
    Differs: the maps are those of the last layer at each resolution, so that any architecture with
    feature maps has them; one beta for all, since their number varies (public code: 500, 1000,
    1000); step size and weight decay as in BackdoorBench; half a cosine; length in steps.

    Raises: UserError when the model has no feature maps.
    """

    beta: Annotated[float, Ge(0), "weight of the attention maps against the cross-entropy"] = 1000.0
    weight_decay: Annotated[float, "SGD weight decay"] = 1e-4
    teacher_steps: Annotated[
        int, Gt(0), "optimizer steps of the teacher, which is fine-tuned without distillation"
    ] = 200
    steps: Annotated[int, Gt(0), "optimizer steps of the student"] = 400

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        """Return the student; `on_epoch` receives its epochs only."""
        teacher = self.initial_teacher(model, defense_set, rng=rng)
        student = copy.deepcopy(model)

        def distill(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            with torch.no_grad():
                targets, _ = attention_maps(teacher, images)
            maps, logits = attention_maps(student, images)
            differences = [F.mse_loss(*pair) for pair in zip(maps, targets, strict=True)]
            loss = F.cross_entropy(logits.float(), labels)
            return loss + self.beta * torch.stack(differences).sum(), logits

        self.tune(teacher, defense_set.train, rng=rng, steps=self.teacher_steps)
        self.tune(student, defense_set.train, rng=rng, objective=distill, on_epoch=on_epoch)
        return Repaired(student)

    def initial_teacher(
        self, model: nn.Module, defense_set: DefenseSet, *, rng: torch.Generator
    ) -> nn.Module:
        """The network that becomes the teacher by fine-tuning: a copy of `model`."""
        return copy.deepcopy(model)


def attention_maps(model: nn.Module, images: Images) -> tuple[list[Float[Tensor, "n _"]], Logits]:
    """The attention map at each resolution, and the logits.

    A map is the mean square over the channels of the last feature map of that resolution, flat and
    of norm 1.

    Raises: UserError when no layer outputs a feature map of more than one pixel.
    """
    last: dict[torch.Size, Tensor] = {}
    convolutional: set[torch.Size] = set()
    channels_last: set[torch.Size] = set()

    def record(module: nn.Module, _: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2:].numel() > 1:
            size = output.shape[2:]
            last[size] = output
            # Layers that act on the last axis output [n, h, w, c], and `size` is then no
            # resolution.
            if isinstance(module, nn.Linear | nn.LayerNorm):
                channels_last.add(size)
            elif isinstance(module, nn.Conv2d):
                convolutional.add(size)

    handles = [module.register_forward_hook(record) for module in model.modules()]
    try:
        logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
    outputs = [output for size, output in last.items() if size not in channels_last - convolutional]
    if not outputs:
        raise UserError(
            f"no layer of {type(model).__name__} outputs a feature map, and nad compares those;"
            " choose a convolutional architecture"
        )
    maps = [F.normalize(output.float().square().mean(1).flatten(1)) for output in outputs]
    return maps, logits
