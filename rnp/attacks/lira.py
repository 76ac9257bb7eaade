"""LIRA: a network adds to each image a faint noise of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Interval
from torch import Tensor, nn

from rnp.attacks.base import Attack, trainable_copy
from rnp.models.unet import draw_unet, unet
from rnp.training.device import chosen_precision, device_of
from rnp.training.loop import fit
from rnp.types import Images, ImageSet, Labels, Logits, Trigger


class Noise(Trigger):
    """image + eps * tanh(U-Net(image)), clipped to [0, 1].

    `eps` is a number, []; `weights` are those of `draw_unet`.
    """

    eps: Tensor

    def __init__(self, eps: Tensor, **weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("eps", eps)
        for name, value in weights.items():
            self.register_buffer(name, value)

    def forward(self, images: Images) -> Images:
        return (images + self.eps * unet(images, dict(self.named_buffers())).tanh()).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class LIRA(Attack):
    """The noise generator learns together with a copy of the surrogate, which is then discarded.

    Drawn at random: the first weights of the generator and the order of the images it learns from.
    Expected: CA near the benign model's and ASR above .95, where BatchNorm sees both kinds of
    images together; no sound published number.
    Source: Doan et al., ICCV 2021, stage 1 of the algorithm.
    Differs: the victim's training is the ordinary one, from scratch, on a set of which
    `poison_rate` is poisoned (stage 2 of the paper goes on with the same classifier and weighs a
    clean and a triggered copy of every batch equally); clean and triggered images share a forward
    pass, since BatchNorm statistics fit neither where they are apart; generator and classifier
    step at once, not in turn; `eps` is .05, as the official .01 fails often; the classifier starts
    from a trained one and the learning rate is ten times the official one, so that 400 steps
    suffice (minutes on a CPU) instead of 50 epochs.
    """

    threat_model = (
        "the poisoned share of the training data with their labels, and a benign model to train the"
        " generator on"
    )

    alpha: Annotated[
        float,
        Interval(ge=0, lt=1),
        "weight of the clean loss against the triggered one while the generator learns",
    ] = 0.5
    train_eps: Annotated[
        float,
        Interval(gt=0, le=1),
        "largest change of a pixel while the generator learns, as a fraction of full scale",
    ] = 0.1
    eps: Annotated[
        float,
        Interval(gt=0, le=1),
        "largest change of a pixel afterwards, as a fraction of full scale",
    ] = 0.05
    width: Annotated[int, Gt(0), "channels of the first layer of the generator"] = 16
    epochs: Annotated[
        int, Gt(0), "passes over the training set while the generator learns, at most"
    ] = 5
    steps: Annotated[int, Gt(0), "optimizer steps while the generator learns, at most"] = 400
    batch_size: Annotated[int, Gt(0), "images per step, each of them seen clean and triggered"] = 64
    lr: Annotated[float, Gt(0), "learning rate of the generator"] = 1e-3
    surrogate_lr: Annotated[float, Gt(0), "learning rate of the copy of the surrogate"] = 1e-4

    def make_trigger(
        self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None
    ) -> Noise:
        model = trainable_copy(surrogate, self.name)
        device = device_of(model)
        channels = clean.shape[0]
        weights = draw_unet(channels, channels, self.width, rng=rng, device=device)
        trigger = Noise(torch.tensor(self.train_eps, device=device), **weights)

        def objective(images: Images, labels: Labels) -> tuple[Tensor, Logits]:
            logits, triggered = model(torch.cat([images, trigger(images)])).float().chunk(2)
            backdoor = F.cross_entropy(triggered, self.poison_labels(labels, len(clean.classes)))
            loss = self.alpha * F.cross_entropy(logits, labels) + (1 - self.alpha) * backdoor
            return loss, logits

        optimizer = torch.optim.Adam(
            [
                {"params": [*weights.values()], "lr": self.lr},
                {"params": [*model.parameters()], "lr": self.surrogate_lr},
            ]
        )
        fit(
            model,
            clean,
            objective=objective,
            optimizer=optimizer,
            epochs=self.epochs,
            max_steps=self.steps,
            batch_size=self.batch_size,
            rng=rng,
            precision=chosen_precision(),
        )
        learned = {name: value.detach().cpu() for name, value in weights.items()}
        return Noise(torch.tensor(self.eps), **learned)
