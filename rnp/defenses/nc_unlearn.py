"""NC unlearning: find a small trigger for every label, and unlearn those that are abnormally
small.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from rnp.defenses.base import Repaired, TuningDefense
from rnp.detection.base import RecoveredTrigger, anomaly_index, blend
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.training.device import device_of
from rnp.types import DefenseSet, Images, ImageSet, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class NCUnlearn(TuningDefense):
    """Fine-tuning on images of which some carry the triggers found, all under their true labels.

    A label is suspicious when its mask is smaller than the median by `least_index` robust standard
    deviations. When none is, the model is returned as it was, and `on_epoch` hears nothing: the
    backdoor, if there is one, went undetected.

    Drawn at random: the images of each step, which of them carry which trigger, and their
    augmentation.

    Source: Wang et al., S&P 2019 (Neural Cleanse), sections IV and VI.C; a fifth of the images
    stamped, as there.
    Differs: a trigger that moves less than half of the images counts as large as the image; sizes
    are compared by their logarithms, since those of benign labels differ so much that even an
    empty mask barely reaches an index of 2; length of the fine-tuning in steps.
    """

    search: NeuralCleanse = NeuralCleanse()
    min_index: Annotated[float, "anomaly index above which a label is suspicious"] = 2.0
    trigger_fraction: Annotated[
        float, Interval(gt=0, le=1), "share of the images that carry a trigger in fine-tuning"
    ] = 0.2
    erase_fraction: Annotated[
        float,
        Interval(ge=0, le=1),
        "share of the images of which a rectangle is painted over in fine-tuning",
    ] = 0.0
    steps: Annotated[int, "optimizer steps of the fine-tuning"] = 200

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        tuned = copy.deepcopy(model).eval()
        found = self.suspicious(self.search.recover(model, defense_set.train, rng=rng))
        return Repaired(
            self.tune_against(found, tuned, defense_set.train, rng=rng, on_epoch=on_epoch)
            if found
            else tuned
        )

    def tune_against(
        self,
        triggers: Sequence[RecoveredTrigger],
        tuned: nn.Module,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        teacher: nn.Module | None = None,
        on_epoch: OnEpoch = no_callback,
    ) -> nn.Module:
        """Change `tuned` in place and return it: a share of the images carries one of the triggers
        each, all keep their labels.

        A `teacher`, in eval mode, stands in for the labels with what it says of the images as they
        were.
        """
        device = device_of(tuned)
        masks, patterns = (
            torch.stack([getattr(trigger, part) for trigger in triggers]).to(device)
            for part in ("mask", "pattern")
        )

        def objective(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
            if teacher is not None:
                with torch.no_grad():
                    truth = teacher(images).float().softmax(1)
            which = torch.randint(len(triggers), (len(images),), generator=rng)
            carriers = (torch.rand(len(images), 1, 1, 1, generator=rng) < self.trigger_fraction).to(
                device
            )
            if self.erase_fraction:
                images = random_erase(images, self.erase_fraction, rng=rng)
            logits = tuned(blend(images, carriers * masks[which].unsqueeze(1), patterns[which]))
            return F.cross_entropy(logits.float(), truth), logits

        return self.tune(tuned, clean, rng=rng, objective=objective, on_epoch=on_epoch)

    def suspicious(self, triggers: list[RecoveredTrigger]) -> list[RecoveredTrigger]:
        """Those whose mask is far smaller than the median, in logarithms."""
        sizes = torch.tensor([trigger.effective_size for trigger in triggers])
        return [
            each
            for each, index in zip(triggers, anomaly_index(sizes.log()))
            if index > self.min_index
        ]


def random_erase(images: Images, share: float, *, rng: torch.Generator) -> Images:
    """New images, a `share` of which, on average, have a rectangle of one color each, random in
    place, shape and color.

    Source: Zhong et al., AAAI 2020 (random erasing), with its sizes: 2 to 33 % of the image, sides
    of at most 10 : 3.
    """
    n, c, h, w = images.shape
    area, ratio, top, left, chosen = torch.rand(5, n, generator=rng)
    area, ratio = (0.02 + 0.31 * area) * h * w, torch.exp((2 * ratio - 1) * math.log(10 / 3))
    height, width = (
        (area * ratio).sqrt().clamp(1, h).floor(),
        (area / ratio).sqrt().clamp(1, w).floor(),
    )
    top, left = (top * (h - height + 1)).floor(), (left * (w - width + 1)).floor()
    rows, columns = torch.arange(h), torch.arange(w)

    def inside(position, start, extent):
        return (position >= start.unsqueeze(1)) & (position < (start + extent).unsqueeze(1))

    painted = inside(rows, top, height).unsqueeze(2) & inside(columns, left, width).unsqueeze(
        1
    )  # [n, h, w]
    painted &= (chosen < share)[:, None, None]
    colors = torch.rand(n, c, 1, 1, generator=rng).to(images.device)
    return torch.where(painted.unsqueeze(1).to(images.device), colors, images)
