"""Accuracy and attack success as fractions, with confidence intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from rnp.training.device import Precision, chosen_precision
from rnp.training.predict import predict
from rnp.types import ImageSet, backdoor_labels


@dataclass(frozen=True)
class Proportion:
    """`hits` of `n`."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / self.n if self.n else float("nan")

    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval."""
        from scipy.stats import binomtest

        if not self.n:
            return float("nan"), float("nan")
        low, high = binomtest(self.hits, self.n).proportion_ci(0.95, method="wilson")
        return float(low), float(high)


def paired_interval(worse: int, better: int, n: int) -> tuple[float, float]:
    """95 % interval of the loss (worse - better) / n in accuracy on `n` images.

    `worse` of them became wrong, `better` became right.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics, 2012: one is added
    to each of the two counts.
    """
    a = worse + 1
    b = better + 1
    m = n + 2
    difference = (a - b) / m
    half = 1.959964 * math.sqrt((a + b) / m - ((a - b) / m) ** 2) / math.sqrt(m)
    return max(-1.0, difference - half), min(1.0, difference + half)


@dataclass(frozen=True)
class Scores:
    """CA over all classes; ASR and RA over triggered images of the other classes than the target.

    ASR + RA is at most 1.
    """

    clean_accuracy: Proportion
    attack_success_rate: Proportion
    robust_accuracy: Proportion
    target_class_accuracy: Proportion

    def flat(self) -> dict[str, float]:
        """The fractions by name."""
        return {name: proportion.value for name, proportion in vars(self).items()}


def score(
    model: nn.Module,
    test: ImageSet,
    triggered: ImageSet,
    target: int | None,
    *,
    precision: Precision = "fp32",
) -> Scores:
    """CA, ASR and RA of `model`.

    `triggered` has the true labels, and no image of the target class. All-to-all attacks have no
    `target`: their ASR counts images that are assigned to the next class, and every class is a
    target class.
    """
    return scores_from_logits(
        predict(model, test.images, precision=precision),
        predict(model, triggered.images, precision=precision),
        test,
        triggered,
        target,
    )


def scores_from_logits(
    clean_logits: Float[Tensor, "n k"],
    triggered_logits: Float[Tensor, "m k"],
    test: ImageSet,
    triggered: ImageSet,
    target: int | None,
) -> Scores:
    """The same from the logits of a model for both sets."""
    correct = clean_logits.argmax(1) == test.labels
    predicted = triggered_logits.argmax(1)
    in_target_class = torch.ones_like(correct) if target is None else test.labels == target
    wanted_labels = backdoor_labels(triggered.labels, target, len(test.classes))
    return Scores(
        clean_accuracy=proportion_of(correct),
        attack_success_rate=proportion_of(predicted == wanted_labels),
        robust_accuracy=proportion_of(predicted == triggered.labels),
        target_class_accuracy=proportion_of(correct[in_target_class]),
    )


def proportion_of(hits: Bool[Tensor, "_"]) -> Proportion:
    """How many are true, of how many."""
    return Proportion(int(hits.sum()), len(hits))


@dataclass(frozen=True)
class EvaluationSets:
    """Test images and triggered ones, and the target label, which is None for all-to-all attacks.

    `triggered` has the true labels, and no image of the target class.
    """

    clean: ImageSet
    triggered: ImageSet
    target: int | None

    def score(self, model: nn.Module) -> Scores:
        """CA, ASR and RA of `model`, by the chosen precision."""
        precision = chosen_precision()
        return score(model, self.clean, self.triggered, self.target, precision=precision)

    def first(self, n: int) -> EvaluationSets:
        """At most `n` images of each set; they are in random order."""
        return EvaluationSets(head(self.clean, n), head(self.triggered, n), self.target)


def head(data: ImageSet, n: int) -> ImageSet:
    """The first `n` images, or all where there are fewer."""
    return data.subset(torch.arange(min(n, len(data))))


def defense_effectiveness(before: Scores, after: Scores) -> float:
    """DER in [0, 1]: 0.5 without effect, 1 for a removed backdoor at no cost in accuracy.

    Source: Zhu et al., ICCV 2023 (FT-SAM).
    Differs: the cost is subtracted, as in the formula and unlike in public code.
    """
    gain = max(0.0, before.attack_success_rate.value - after.attack_success_rate.value)
    cost = max(0.0, before.clean_accuracy.value - after.clean_accuracy.value)
    return (gain - cost + 1) / 2


ALLOWED_COST = 0.02
"""Clean accuracy that a backdoored model may have below the benign one."""


def gate_failure(backdoored: Scores, benign_accuracy: float, min_asr: float) -> str:
    """Why the backdoor does not count as real; empty when it does.

    It does with a high enough ASR and a CA close to that of the benign model.
    """
    asr = backdoored.attack_success_rate.value
    ca = backdoored.clean_accuracy.value
    if asr < min_asr:
        return f"ASR {asr:.3f} is below {min_asr}"
    if ca < benign_accuracy - ALLOWED_COST:
        benign = f"the benign model's {benign_accuracy:.3f}"
        return f"CA {ca:.3f} is more than {ALLOWED_COST} below {benign}"
    return ""
