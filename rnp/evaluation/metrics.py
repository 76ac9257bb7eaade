"""What is measured: accuracies as fractions, with exact binomial intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rnp.training.device import Precision
from rnp.training.predict import predict
from rnp.types import ImageSet, backdoor_labels


@dataclass(frozen=True)
class Proportion:
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


@dataclass(frozen=True)
class Scores:
    """CA over all classes; ASR and RA over triggered images of the non-target classes, so that ASR
    + RA <= 1.
    """

    clean_accuracy: Proportion
    attack_success_rate: Proportion
    robust_accuracy: Proportion
    target_class_accuracy: Proportion

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
    return scores_from_logits(
        predict(model, test.images, precision=precision),
        predict(model, triggered.images, precision=precision),
        test,
        triggered,
        target,
    )


def scores_from_logits(
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
    goals = backdoor_labels(triggered.labels, target, len(test.classes))
    return Scores(
        Proportion(int((clean == test.labels).sum()), len(test)),
        Proportion(int((attacked == goals).sum()), len(triggered)),
        Proportion(int((attacked == triggered.labels).sum()), len(triggered)),
        Proportion(int((clean == test.labels)[victims].sum()), int(victims.sum())),
    )


def defense_effectiveness(before: Scores, after: Scores) -> float:
    """DER in [0, 1]: .5 without effect, 1 for a backdoor gone at no cost in accuracy.

    Source: Zhu et al., ICCV 2023 (FT-SAM). Differs: the cost is subtracted, as the formula says
    and public code does not.
    """
    gain = max(0.0, before.attack_success_rate.value - after.attack_success_rate.value)
    cost = max(0.0, before.clean_accuracy.value - after.clean_accuracy.value)
    return (gain - cost + 1) / 2


ALLOWED_COST = 0.02


def gate_failure(backdoored: Scores, accuracy_benign: float, least_asr: float) -> str:
    """Why the backdoor is not real; empty when it is: ASR high enough and CA close to that of the
    benign benign.
    """
    asr, ca = backdoored.attack_success_rate.value, backdoored.clean_accuracy.value
    if asr < least_asr:
        return f"ASR {asr:.3f} is below {least_asr}"
    if ca < accuracy_benign - ALLOWED_COST:
        return f"CA {ca:.3f} is more than {ALLOWED_COST} below the benign model's {accuracy_benign:.3f}"
    return ""
