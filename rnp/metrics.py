"""What is measured: accuracies as fractions, with exact binomial intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from rnp.training import Precision, Train, predict
from rnp.types import ImageSet, Indices, Labels, Logits, OnEpoch, ignore, targets


@dataclass(frozen=True)
class Share:
    """`hits` of `n`, with a 95 % Wilson interval."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else float("nan")

    def interval(self) -> tuple[float, float]:
        from scipy.stats import binomtest

        if not self.n:
            return float("nan"), float("nan")
        low, high = binomtest(self.hits, self.n).proportion_ci(0.95, method="wilson")
        return float(low), float(high)


def paired_interval(worse: int, better: int, n: int) -> tuple[float, float]:
    """95 % interval of (worse - better) / n, where of `n` pairs `worse` turned wrong and `better`
    turned right.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics, 2012: one is added
    to each of the two counts.
    """
    a, b, m = worse + 1, better + 1, n + 2
    difference, half = (
        (a - b) / m,
        1.959964 * math.sqrt((a + b) / m - ((a - b) / m) ** 2) / math.sqrt(m),
    )
    return max(-1.0, difference - half), min(1.0, difference + half)


def class_shares(predicted: Labels, labels: Labels, k: int) -> Float[Tensor, "k"]:
    """For each class its share of the predictions for images of the *other* classes; accuracy that
    is left does not count.
    """
    classes = torch.arange(k).unsqueeze(1)  # [k, 1]
    other = labels != classes  # [k, n]
    return ((predicted == classes) & other).sum(1) / other.sum(1).clamp_min(1)


@dataclass(frozen=True)
class Scores:
    """CA over all classes; ASR and RA over triggered images of the non-target classes, so that ASR
    + RA <= 1.
    """

    clean_accuracy: Share
    attack_success_rate: Share
    robust_accuracy: Share
    target_class_accuracy: Share

    def flat(self) -> dict[str, float]:
        return {name: share.value for name, share in vars(self).items()}


def score(
    model: nn.Module,
    test: ImageSet,
    triggered: ImageSet,
    target: int | None,
    *,
    precision: Precision = "fp32",
) -> Scores:
    """CA, ASR and RA of `model`; `triggered` holds no image of the target class and carries true
    labels.

    All-to-all attacks have no `target`: their ASR counts images sent to the next class, and every
    class is a target class.
    """
    return judge(
        predict(model, test.images, precision=precision),
        predict(model, triggered.images, precision=precision),
        test,
        triggered,
        target,
    )


def judge(
    clean: Float[Tensor, "n k"],
    attacked: Float[Tensor, "m k"],
    test: ImageSet,
    triggered: ImageSet,
    target: int | None,
) -> Scores:
    """`score` of a model whose logits for both sets are known."""
    clean, attacked = clean.argmax(1), attacked.argmax(1)
    victims = (
        torch.ones_like(test.labels, dtype=torch.bool) if target is None else test.labels == target
    )
    goals = targets(triggered.labels, target, len(test.classes))
    return Scores(
        Share(int((clean == test.labels).sum()), len(test)),
        Share(int((attacked == goals).sum()), len(triggered)),
        Share(int((attacked == triggered.labels).sum()), len(triggered)),
        Share(int((clean == test.labels)[victims].sum()), int(victims.sum())),
    )


def defence_effectiveness(before: Scores, after: Scores) -> float:
    """DER in [0, 1]: .5 without effect, 1 for a backdoor gone at no cost in accuracy.

    Source: Zhu et al., ICCV 2023 (FT-SAM). Differs: the cost is subtracted, as the formula says
    and public code does not.
    """
    gain = max(0.0, before.attack_success_rate.value - after.attack_success_rate.value)
    cost = max(0.0, before.clean_accuracy.value - after.clean_accuracy.value)
    return (gain - cost + 1) / 2


ALLOWED_COST = 0.02


def gate_reason(backdoored: Scores, accuracy_twin: float, least_asr: float) -> str:
    """Why the backdoor is not real; empty when it is: ASR high enough and CA close to that of the
    benign twin.
    """
    asr, ca = backdoored.attack_success_rate.value, backdoored.clean_accuracy.value
    if asr < least_asr:
        return f"ASR {asr:.3f} is below {least_asr}"
    if ca < accuracy_twin - ALLOWED_COST:
        return f"CA {ca:.3f} is more than {ALLOWED_COST} below the twin's {accuracy_twin:.3f}"
    return ""


class EarlyLoss:
    """Hears of the steps of a training run: the mean cross-entropy of each image over its first
    epochs, in nats.

    Source: Li et al., NeurIPS 2021 (ABL), section 3.2: poisoned images are learned first; a fifth
    of the run, as there.
    Differs: the mean of the losses that training computes anyway, where ABL adds a pass at the end
    of that part, and holds the loss near a value of its own meanwhile.
    """

    def __init__(self, images: int, epochs: int, device: torch.device) -> None:
        self.epochs = max(1, round(0.2 * epochs))
        self.total, self.times = (
            torch.zeros(images, device=device),
            torch.zeros(images, device=device),
        )

    def __call__(self, positions: Indices, labels: Labels, logits: Logits) -> None:
        here = positions.to(logits.device)
        fresh = self.times[here] < self.epochs
        self.total[here] += fresh * F.cross_entropy(logits.float(), labels, reduction="none")
        self.times[here] += fresh.float()

    def mean(self) -> Float[Tensor, "n"]:
        """NaN for images that were never seen; on the CPU."""
        return (self.total / self.times).cpu()


@dataclass(frozen=True, kw_only=True)
class Recorded(Train):
    """A recipe of which `losses` hears."""

    losses: EarlyLoss

    def __call__(
        self, model: nn.Module, data: ImageSet, *, rng: torch.Generator, on_epoch: OnEpoch = ignore
    ) -> nn.Module:
        return super().__call__(model, data, rng=rng, on_epoch=on_epoch, on_batch=self.losses)
