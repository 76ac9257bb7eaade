"""LIRA: a network adds to each image a faint noise of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rnp.attacks.base import Attack, trainable_copy
from rnp.errors import UserError
from rnp.training import Precision, device_of, fit
from rnp.types import Images, ImageSet, Labels, Logits, Trigger
from rnp.unet import draw_unet, unet


class Noise(Trigger):
    """image + eps * tanh(U-Net(image)), clipped to [0, 1]; `eps` is a scalar, `weights` are those
    of `draw_unet`.
    """

    def __init__(self, eps: Tensor, **weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("eps", eps)
        for name, value in weights.items():
            self.register_buffer(name, value)

    def forward(self, images: Images) -> Images:
        return (images + self.eps * unet(images, dict(self.named_buffers())).tanh()).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class LIRA(Attack):
    """The generator learns together with a copy of the surrogate, which is thrown away; then it
    stays as it is.

    Drawn at random: the first weights of the generator and the order of the images it learns from.

    Expected: CA near the twin's and ASR above .95, where BatchNorm sees both kinds of images
    together; no sound published number.
    Source: Doan et al., ICCV 2021, stage 1 of the algorithm.
    Differs: the victim's training is the ordinary one, from scratch, on a set of which
    `poison_rate` is poisoned (stage 2 of the paper goes on with the same classifier and weighs a
    clean and a triggered copy of every batch equally); clean and triggered images share a forward
    pass, since BatchNorm statistics fit neither where they are apart; generator and classifier
    step at once, not in turn; `eps` is .05, as the official .01 fails often; the classifier starts
    from a trained one and the learning rate is ten times the official one, so that 400 steps do
    (minutes on a CPU), not 50 epochs.
    """

    controls = (
        "the poisoned share of the training data with their labels, and a benign model to train the"
        " generator on"
    )

    alpha: Annotated[
        float, "weight of the clean loss against the triggered one while the generator learns"
    ] = 0.5
    train_eps: Annotated[
        float, "largest change of a pixel while the generator learns, as a fraction of full scale"
    ] = 0.1
    eps: Annotated[float, "largest change of a pixel afterwards, as a fraction of full scale"] = (
        0.05
    )
    width: Annotated[int, "channels of the first layer of the generator"] = 16
    epochs: Annotated[int, "passes over the training set while the generator learns, at most"] = 5
    steps: Annotated[int, "optimiser steps while the generator learns, at most"] = 400
    batch_size: Annotated[int, "images per step, each of them seen clean and triggered"] = 64
    lr: Annotated[float, "learning rate of the generator"] = 1e-3
    surrogate_lr: Annotated[float, "learning rate of the copy of the surrogate"] = 1e-4
    precision: Annotated[
        Precision, "arithmetic while the generator learns; auto takes bf16 where it is native"
    ] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train_eps", "eps"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(
                    f"{name} must be in (0, 1], got {getattr(self, name):g}; it is a fraction of"
                    " full scale"
                )
        if not 0 <= self.alpha < 1:
            raise UserError(
                f"alpha must be in [0, 1), got {self.alpha:g}; at 1 the generator would learn"
                " nothing"
            )
        for name in ("width", "epochs", "steps", "batch_size", "lr", "surrogate_lr"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name):g}")

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Noise:
        model = trainable_copy(surrogate, self.name)
        device, channels = device_of(model), clean.shape[0]
        weights = draw_unet(channels, channels, self.width, rng=rng, device=device)
        trigger = Noise(torch.tensor(self.train_eps, device=device), **weights)

        def objective(images: Images, labels: Labels) -> tuple[Tensor, Logits]:
            logits, triggered = model(torch.cat([images, trigger(images)])).float().chunk(2)
            backdoor = F.cross_entropy(triggered, self.relabel(labels, len(clean.classes)))
            return (
                self.alpha * F.cross_entropy(logits, labels) + (1 - self.alpha) * backdoor,
                logits,
            )

        optimiser = torch.optim.Adam(
            [
                {"params": [*weights.values()], "lr": self.lr},
                {"params": [*model.parameters()], "lr": self.surrogate_lr},
            ]
        )
        fit(
            model,
            clean,
            objective=objective,
            optimiser=optimiser,
            epochs=self.epochs,
            max_steps=self.steps,
            batch_size=self.batch_size,
            rng=rng,
            precision=self.precision,
        )
        return Noise(
            torch.tensor(self.eps),
            **{name: value.detach().cpu() for name, value in weights.items()},
        )
