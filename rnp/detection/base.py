"""What detectors of triggers, labels and samples have in common, and the scores for them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.models.features import head
from rnp.registry import Method
from rnp.training.device import chosen_precision
from rnp.training.predict import predict
from rnp.types import Bytes, Epoch, Images, ImageSet, Labels, to_floats

LOCAL = 0.1
"""Share of the pixels within which a trigger is local."""


@dataclass(frozen=True)
class RecoveredTrigger:
    """A mask through which `pattern` sends images to `label`.

    Mask and pattern are in [0, 1], on the CPU. `success` and `baseline` are the shares of the
    images of *other* classes that the model assigns to `label`, with the trigger and without.
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
        """The success above the baseline, as a share of what the baseline leaves.

        An unlearned model assigns many images to its label without a trigger; only the gain is
        evidence for the trigger.
        """
        return (self.success - self.baseline) / (1 - self.baseline) if self.baseline < 1 else 0.0

    @property
    def effective_size(self) -> float:
        """Pixels of the mask; those of the image for a trigger with a gain of at most a half."""
        return self.l1 if self.gain > 0.5 else float(self.mask.numel())

    @functools.cached_property
    def is_local(self) -> bool:
        """Whether its mask is 0 outside a tenth of the pixels.

        That of a rectangle is; the mask of a trigger recovered by gradient descent is nowhere 0.
        """
        return bool((self.mask > 0).sum() <= LOCAL * self.mask.numel())

    def apply(self, images: Images) -> Images:
        """New images with the trigger."""
        return blend(images, self.mask.to(images.device), self.pattern.to(images.device))


def blend(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """(1 - mask) * images + mask * pattern, for all leading dimensions that broadcast."""
    return images + mask * (pattern - images)


def measure_trigger(
    label: int,
    mask: Float[Tensor, "h w"],
    pattern: Float[Tensor, "c h w"],
    model: nn.Module,
    clean: ImageSet,
    predicted: Labels,
) -> RecoveredTrigger:
    """A trigger with its success on `model` and its baseline.

    `predicted` are the predictions of `model` for the images without the trigger.
    """
    others = clean.labels != label
    triggered = blend(to_floats(clean.images[others]), mask, pattern)
    logits = predict(model, triggered, precision=chosen_precision())
    success = (logits.argmax(1) == label).float().mean().item()
    baseline = (predicted[others] == label).float().mean().item()
    return RecoveredTrigger(label, mask, pattern, success, baseline)


@dataclass(frozen=True, kw_only=True)
class TriggerRecovery(Method, ABC):
    """Reverse engineering of triggers.

    In a model without a backdoor it finds the pattern that comes nearest to a trigger.
    """

    @abstractmethod
    def recover(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> list[RecoveredTrigger]:
        """One trigger per class, in the order of the classes; `model` is left unchanged.

        All labels are recovered in one call, so that a method can optimize them in one batch: ten
        labels then cost far less than ten runs.
        """


@dataclass(frozen=True)
class Evidence:
    """What is known of a model before a label detector runs.

    `triggers` were recovered from `model`, one per class in order; the list is empty unless a
    detector needs them. `unlearned` and `trajectory` come from unlearning the given model.
    """

    model: nn.Module
    triggers: list[RecoveredTrigger]
    unlearned: nn.Module
    trajectory: list[Epoch]


@dataclass(frozen=True)
class LabelVerdict:
    """The predicted backdoor label, or None for "no decision".

    `margin` is the lead of the highest score over the second.
    """

    label: int | None
    margin: float


@dataclass(frozen=True, kw_only=True)
class LabelDetector(Method, ABC):
    """Predicts which class is the backdoor's target; a high score is suspicious."""

    needs_unlearned: ClassVar[bool] = False
    """Whether unlearning is part of the method; others can be run on the unlearned copy too."""
    needs_triggers: ClassVar[bool] = False
    """Whether it scores recovered triggers."""
    judges_unlearned: ClassVar[bool] = True
    """Whether its score of the unlearned copy is of use, too."""
    min_classes: ClassVar[int] = 2
    """The number of classes below which it cannot compare."""

    min_score: Annotated[float, "highest score below which no label is predicted"]
    min_margin: Annotated[float, "lead over the second class below which no label is predicted"]

    @abstractmethod
    def score(
        self, model: nn.Module, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """One score per class, high = suspicious; `model` is left unchanged."""

    def score_evidence(
        self, evidence: Evidence, clean: ImageSet, *, rng: torch.Generator
    ) -> Float[Tensor, "k"]:
        """The same score, from triggers and unlearned models that exist already."""
        return self.score(evidence.model, clean, rng=rng)

    def obstacle(self, model: nn.Module, num_classes: int) -> str:
        """Why it cannot judge `model`, as the predicate of a sentence; empty if it can."""
        return "" if num_classes >= self.min_classes else f"needs {self.min_classes} classes"

    def verdict(self, scores: Float[Tensor, "k"]) -> LabelVerdict:
        """The class with the highest score, unless that score or its lead is too small."""
        first, second = scores.topk(2).values.tolist()
        decided = first >= self.min_score and first - second >= self.min_margin
        return LabelVerdict(int(scores.argmax()) if decided else None, first - second)


def outlier_p_value(scores: Float[Tensor, "k"]) -> float:
    """How probable it is that the highest of k scores leads so far by chance alone.

    If the scores were draws from one normal distribution, the highest would lie as many standard
    deviations above the mean of the others with at most this probability: the one-sided test of
    Grubbs, Technometrics 1969, in the form of a deleted residual, for the largest of k.
    """
    from scipy.stats import t

    ordered = scores.double().sort(descending=True).values
    first, others = ordered[0], ordered[1:]
    k = len(scores)
    deviation = others.std() * (1 + 1 / (k - 1)) ** 0.5
    statistic = (first - others.mean()) / deviation.clamp_min(1e-12)
    return min(1.0, k * float(t.sf(float(statistic), k - 2)))


def unless_chance(
    verdict: LabelVerdict, scores: Float[Tensor, "k"], max_p_value: float
) -> LabelVerdict:
    """`verdict`, but without a label where so high a score has a higher probability by chance."""
    by_chance = outlier_p_value(scores) > max_p_value
    return LabelVerdict(None, verdict.margin) if by_chance else verdict


@dataclass(frozen=True, kw_only=True)
class SampleDetector(Method, ABC):
    """Finds images that carry a trigger; a high score is suspicious."""

    needs_unlearned: ClassVar[bool] = False
    """Whether the unlearned model is part of the method."""
    needs_ensemble: ClassVar[bool] = False
    """Whether `unlearned` is to be the mean of the checkpoints along the unlearning."""

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
        """One score per image, high = suspicious; all arguments are left unchanged.

        Args:
            model: The classifier that `images` are meant for.
            images: The images to score.
            clean: The defender's images.
            unlearned: `model` after unlearning, for the methods that need it.

        Raises: UserError when the method needs `unlearned` and it is None.
        """

    def require_unlearned(self, unlearned: nn.Module | None) -> nn.Module:
        """`unlearned`, for the methods that need it.

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
    """How well scores separate triggered images from clean ones; all are fractions.

    `auprc` is to be read against `base_rate`, the share of triggered images. The last three are
    measured at the threshold that a defender can set: `fpr` on the clean images, which is about
    5 % if the defense set is like them, and `fpr_target_class` on the clean images of the target
    class, NaN when there are none.
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
    clean_scores: Float[Tensor, "m"],
) -> SampleScores:
    """How well `scores` separate the images that are `triggered` from the others.

    `target_class` marks the images whose true label is the target. `clean_scores` are those of
    the defender's clean images, best of those that the unlearning has not seen.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    flagged = (scores > threshold(clean_scores)).float()
    return SampleScores(
        auroc=float(roc_auc_score(triggered.numpy(), scores.numpy())),
        auprc=float(average_precision_score(triggered.numpy(), scores.numpy())),
        base_rate=triggered.float().mean().item(),
        tpr_at_5_fpr=flagged[triggered].mean().item(),
        fpr=flagged[~triggered].mean().item(),
        fpr_target_class=flagged[~triggered & target_class].mean().item(),
    )


def threshold(clean_scores: Float[Tensor, "m"], fpr: float = 0.05) -> float:
    """The score above which an image is flagged; a share `fpr` of the clean images is above it."""
    return clean_scores.quantile(1 - fpr).item()


def penultimate_features(model: nn.Module, images: Bytes) -> tuple[Float[Tensor, "n d"], Labels]:
    """Penultimate features and predicted classes of all images, on the CPU.

    `model` is left unchanged.
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
    """Distance below the median in robust standard deviations; negative above the median.

    Only small values are suspicious.

    Source: Wang et al., S&P 2019 (Neural Cleanse), section IV; 1.4826 makes the median deviation
    that of a Gaussian.
    """
    median = values.quantile(0.5)
    deviation = 1.4826 * (median - values).abs().quantile(0.5)
    # Otherwise rounding would make each of equal values an outlier.
    return (median - values) / deviation.clamp_min(1e-6)


def iou(mask: Float[Tensor, "h w"], support: Bool[Tensor, "h w"]) -> float:
    """Overlap of the true `support` with the pixels above half of the mask's maximum, in [0, 1]."""
    return jaccard(mask > 0.5 * mask.max(), support)


def iou_top_k(mask: Float[Tensor, "h w"], support: Bool[Tensor, "h w"]) -> float:
    """Overlap of the true `support` with as many of the mask's highest pixels, in [0, 1]."""
    top = torch.zeros_like(support)
    top.view(-1)[mask.flatten().topk(int(support.sum())).indices] = True
    return jaccard(top, support)


def jaccard(a: Bool[Tensor, "h w"], b: Bool[Tensor, "h w"]) -> float:
    """Size of the intersection over that of the union."""
    return ((a & b).sum() / (a | b).sum().clamp_min(1)).item()
