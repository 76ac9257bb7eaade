"""What a detector promises for triggers, labels and samples, and the numbers by which each is
judged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.models.features import head
from rnp.registry import Method
from rnp.training.device import Precision
from rnp.training.predict import predict
from rnp.types import Bytes, Epoch, Images, ImageSet, Labels, to_floats


@dataclass(frozen=True)
class RecoveredTrigger:
    """A small mask through which `pattern` sends images to `label`; mask and pattern lie in [0,
    1], on the CPU.

    `success` and `baseline` are the shares of the images of *other* classes that the model sends
    to `label`, with the trigger and without.
    """

    label: int
    mask: Float[Tensor, "h w"]
    pattern: Float[Tensor, "c h w"]
    success: float
    baseline: float

    @property
    def l1(self) -> float:
        """Size of the mask, in pixels."""
        return self.mask.sum().item()

    @property
    def gain(self) -> float:
        """What the trigger adds: the success over the baseline, as a share of what was left to add.

        An unlearned model sends many images to its label unasked; only this part speaks for the
        trigger.
        """
        return (self.success - self.baseline) / (1 - self.baseline) if self.baseline < 1 else 0.0

    @property
    def size(self) -> float:
        """`l1`, or the pixels of the image for a trigger that moves less than half of the images
        that were left to move.
        """
        return self.l1 if self.gain > 0.5 else float(self.mask.numel())

    def apply(self, images: Images) -> Images:
        return blend(images, self.mask.to(images.device), self.pattern.to(images.device))


def blend(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """(1 - mask) * images + mask * pattern, with whatever leading dimensions broadcast."""
    return images + mask * (pattern - images)


def measure_trigger(
    label: int,
    mask: Float[Tensor, "h w"],
    pattern: Float[Tensor, "c h w"],
    model: nn.Module,
    clean: ImageSet,
    before: Labels,
    precision: Precision,
) -> RecoveredTrigger:
    """A trigger with its success on `model` and its baseline; `before` is what the model says of
    the images without it.
    """
    others = clean.labels != label
    stamped = blend(to_floats(clean.images[others]), mask, pattern)
    success = (
        (predict(model, stamped, precision=precision).argmax(1) == label).float().mean().item()
    )
    return RecoveredTrigger(
        label, mask, pattern, success, (before[others] == label).float().mean().item()
    )


@dataclass(frozen=True, kw_only=True)
class TriggerRecovery(Method, ABC):
    """Reverse engineering of triggers; in a model without a backdoor it finds what comes nearest
    to one.
    """

    @abstractmethod
    def recover(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> list[RecoveredTrigger]:
        """One trigger per class, in the order of the classes; `model` is left unchanged.

        All labels are asked for at once, so that a method can optimize them in one batch: ten
        labels then cost far less than ten runs.
        """


@dataclass(frozen=True)
class Evidence:
    """What is known of a model: itself, the triggers recovered from it, and what unlearning made
    of the one that was given.
    """

    model: nn.Module
    triggers: list[
        RecoveredTrigger
    ]  # one per class in order; empty unless a detector asks for them
    unlearned: nn.Module
    trajectory: list[Epoch]


@dataclass(frozen=True)
class LabelVerdict:
    """The backdoor's label, or None for "no decision"; `margin` is the lead of the highest score
    over the second.
    """

    label: int | None
    margin: float


@dataclass(frozen=True, kw_only=True)
class LabelDetector(Method, ABC):
    """Which class is the backdoor's? A high score is suspicious."""

    needs_unlearned: ClassVar[bool] = False
    """Whether unlearning is part of the method; one that does without can be asked of the
    unlearned copy too.
    """
    needs_triggers: ClassVar[bool] = False
    """Whether it judges by recovered triggers."""
    min_classes: ClassVar[int] = 2
    """What it needs to compare a class with."""

    min_score: Annotated[float, "highest score below which no label is named"]
    min_margin: Annotated[float, "lead over the second class below which no label is named"]

    @abstractmethod
    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """One score per class, high = suspicious; `model` is left unchanged."""

    def score_detection(
        self, evidence: Evidence, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """The same score where more than the model is known already."""
        return self.score(evidence.model, clean, rng=rng)

    def verdict(self, scores: Float[Tensor, "k"]) -> LabelVerdict:
        """The class with the highest score, unless that score or its lead is too small."""
        first, second = scores.topk(2).values.tolist()
        named = first >= self.min_score and first - second >= self.min_margin
        return LabelVerdict(int(scores.argmax()) if named else None, first - second)


@dataclass(frozen=True, kw_only=True)
class SampleDetector(Method, ABC):
    """Which images carry a trigger? A high score is suspicious."""

    needs_unlearned: ClassVar[bool] = False
    """Whether the unlearned model is part of the method."""
    needs_ensemble: ClassVar[bool] = False
    """Whether `unlearned` is to be the mean of the checkpoints along the unlearning, not one of
    them.
    """

    @abstractmethod
    def score(
        self,
        model: nn.Module,
        images: Bytes,
        clean: ImageSet,
        *,
        rng: torch.Generator,
        unlearned: nn.Module | None = None,
    ) -> Float[Tensor, "n"]:
        """One score per image, high = suspicious.

        `model` is the classifier that `images` are meant for, `unlearned` the same one after
        unlearning, for the methods that ask it, `clean` the defender's images; all are left
        unchanged.

        Raises: UserError when the method needs `unlearned` and it is None.
        """

    def require_unlearned(self, unlearned: nn.Module | None) -> nn.Module:
        """`unlearned`, for the methods that cannot do without.

        Raises: UserError when it is None.
        """
        if unlearned is None:
            raise UserError(
                f"{self.name} compares the model with its unlearned copy, got none; run unlearn"
                " first"
            )
        return unlearned


@dataclass(frozen=True)
class SampleScores:
    """How well scores tell triggered images from clean ones; all are shares.

    `auprc` is to be read against `base_rate`, the share of triggered images. The last three hold
    at the `threshold` that a defender can set: `fpr` is what it costs on the clean images tested,
    about 5 % if the defense set is like them, and `fpr_target_class` what it costs on clean images
    of the target class, NaN when there are none.
    """

    auroc: float
    auprc: float
    base_rate: float
    tpr_at_5_fpr: float
    fpr: float
    fpr_target_class: float


def score_detection(
    scores: Float[Tensor, "n"],
    triggered: Bool[Tensor, "n"],
    target_class: Bool[Tensor, "n"],
    defense: Float[Tensor, "m"],
) -> SampleScores:
    """Judge `scores`: `triggered` marks the positives, `target_class` the images whose true label
    is the target.

    `defense` holds the scores of the defender's clean images, best those that the unlearning has
    not seen.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    flagged = (scores > threshold(defense)).float()
    return SampleScores(
        auroc=float(roc_auc_score(triggered.numpy(), scores.numpy())),
        auprc=float(average_precision_score(triggered.numpy(), scores.numpy())),
        base_rate=triggered.float().mean().item(),
        tpr_at_5_fpr=flagged[triggered].mean().item(),
        fpr=flagged[~triggered].mean().item(),
        fpr_target_class=flagged[~triggered & target_class].mean().item(),
    )


def threshold(defense: Float[Tensor, "m"], fpr: float = 0.05) -> float:
    """The score above which an image is flagged: it lets all but `fpr` of the clean defense images
    pass.
    """
    return defense.quantile(1 - fpr).item()


def penultimate_features(model: nn.Module, images: Bytes) -> tuple[Float[Tensor, "n d"], Labels]:
    """Penultimate features of all images and the class that each is taken for, on the CPU; `model`
    is left as it was.
    """
    parts: list[Tensor] = []
    handle = head(model).register_forward_pre_hook(
        lambda _, inputs: parts.append(inputs[0].float().cpu())
    )
    try:
        predicted = predict(model, images).argmax(1)
    finally:
        handle.remove()
    return torch.cat(parts), predicted


def anomaly_index(values: Float[Tensor, "k"]) -> Float[Tensor, "k"]:
    """Distance below the median in robust standard deviations; negative above it: only small
    values are suspicious.

    Source: Wang et al., S&P 2019 (Neural Cleanse), section IV; 1.4826 makes the median deviation
    that of a Gaussian.
    """
    distance = values.quantile(0.5) - values
    return distance / (1.4826 * distance.abs().quantile(0.5)).clamp_min(1e-6)


def iou(mask: Float[Tensor, "h w"], support: Bool[Tensor, "h w"]) -> float:
    """Overlap of the true `support` with the pixels above half of the mask's maximum, in [0, 1]."""
    return jaccard(mask > 0.5 * mask.max(), support)


def iou_top_k(mask: Float[Tensor, "h w"], support: Bool[Tensor, "h w"]) -> float:
    """Overlap of the true `support` with as many of the mask's highest pixels, in [0, 1]."""
    top = torch.zeros_like(support)
    top.view(-1)[mask.flatten().topk(int(support.sum())).indices] = True
    return jaccard(top, support)


def jaccard(one: Bool[Tensor, "h w"], other: Bool[Tensor, "h w"]) -> float:
    return ((one & other).sum() / (one | other).sum().clamp_min(1)).item()
