"""NC unlearning: recover a small trigger for every label, and fine-tune against those that are
abnormally small.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Gt, Interval
from jaxtyping import Float
from torch import Tensor, nn

from rnp.defenses.base import Repaired, TuningDefense
from rnp.detection.base import RecoveredTrigger, anomaly_index, blend
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.training.device import device_of
from rnp.training.distort import random_rectangles
from rnp.types import DefenseSet, Images, ImageSet, OnEpoch, no_callback


@dataclass(frozen=True, kw_only=True)
class NCUnlearn(TuningDefense):
    """Fine-tune on images of which some carry a recovered trigger, all under their true labels.

    A label is suspicious when its mask is smaller than the median by more than `min_index` robust
    standard deviations. When no label is, a copy of the model is returned and `on_epoch` is never
    called: the backdoor, if there is one, went undetected.

    Drawn at random: what recovering the triggers draws, the order of the images and their
    augmentation, and which of them carry which trigger.

    Source: Wang et al., S&P 2019 (Neural Cleanse), sections IV and VI.C; a fifth of the images
    carry a trigger, as there.
    Differs: a trigger that works on less than half of the images counts as large as the image;
    sizes are compared by their logarithms, since those of benign labels differ so much that even
    an empty mask barely reaches an index of 2; length of the fine-tuning in steps.
    """

    search: NeuralCleanse = NeuralCleanse()
    min_index: Annotated[float, "anomaly index above which a label is suspicious"] = 2.0
    trigger_fraction: Annotated[
        float, Interval(gt=0, le=1), "fraction of the images that carry a trigger in fine-tuning"
    ] = 0.2
    erase_fraction: Annotated[
        float,
        Interval(ge=0, le=1),
        "fraction of the images of which a random rectangle is erased in fine-tuning",
    ] = 0.0
    steps: Annotated[int, Gt(0), "optimizer steps of the fine-tuning"] = 200

    def repair(
        self,
        model: nn.Module,
        defense_set: DefenseSet,
        *,
        rng: torch.Generator,
        on_epoch: OnEpoch = no_callback,
    ) -> Repaired:
        tuned = copy.deepcopy(model).eval()
        triggers = self.suspicious(self.search.recover(model, defense_set.train, rng=rng))
        if triggers:
            self.tune_against(triggers, tuned, defense_set.train, rng=rng, on_epoch=on_epoch)
        return Repaired(tuned, tuned_labels=[trigger.label for trigger in triggers])

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
        """Fine-tune `tuned` in place on images of which some carry one of `triggers`; return it.

        Args:
            teacher: A network in eval mode whose outputs for the images without trigger replace
                their labels.
        """
        device = device_of(tuned)
        masks = torch.stack([trigger.mask for trigger in triggers]).to(device)
        patterns = torch.stack([trigger.pattern for trigger in triggers]).to(device)

        def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            targets = labels if teacher is None else soft_labels(teacher, images)
            index = torch.randint(len(triggers), (len(images),), generator=rng)
            draws = torch.rand(len(images), 1, 1, 1, generator=rng)
            carriers = (draws < self.trigger_fraction).to(device)
            if self.erase_fraction:
                images = random_erase(images, self.erase_fraction, rng=rng)
            logits = tuned(blend(images, carriers * masks[index].unsqueeze(1), patterns[index]))
            return F.cross_entropy(logits.float(), targets), logits

        return self.tune(tuned, clean, rng=rng, objective=objective, on_epoch=on_epoch)

    def suspicious(self, triggers: Sequence[RecoveredTrigger]) -> list[RecoveredTrigger]:
        """The triggers whose mask is far smaller than the median, by logarithms."""
        sizes = torch.tensor([trigger.effective_size for trigger in triggers])
        indices = anomaly_index(sizes.log())
        return [trigger for trigger, index in zip(triggers, indices) if index > self.min_index]


@torch.no_grad()
def soft_labels(teacher: nn.Module, images: Images) -> Float[Tensor, "n k"]:
    """The probabilities that `teacher` assigns to each class."""
    return teacher(images).float().softmax(1)


def random_erase(images: Images, fraction: float, *, rng: torch.Generator) -> Images:
    """Copies of `images`, of which a random `fraction` have a rectangle of one color each.

    Drawn at random: which images, and the place, shape and color of each rectangle.

    Source: Zhong et al., AAAI 2020 (random erasing), with its sizes: 2 to 33 % of the image, sides
    of at most 10 : 3.
    """
    n, c, h, w = images.shape
    rectangles = random_rectangles(n, h, w, 0.02, 0.33, rng=rng)
    choice = torch.rand(n, 1, 1, generator=rng)
    erased = (rectangles & (choice < fraction)).unsqueeze(1).to(images.device)
    colors = torch.rand(n, c, 1, 1, generator=rng).to(images.device)
    return torch.where(erased, colors, images)
