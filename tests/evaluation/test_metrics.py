"""CA, ASR, RA and DER with a model whose predictions are the first pixels of its images."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnp.evaluation.metrics import (
    EvaluationSets,
    Proportion,
    Scores,
    defense_effectiveness,
    gate_failure,
    paired_interval,
    score,
)
from rnp.training.augment import Augment
from rnp.training.loss_recorder import EarlyLossRecorder, TrainWithLosses
from rnp.training.predict import class_shares
from rnp.types import ImageSet

TARGET = 0


class Parrot(nn.Module):
    """Predicts the value of the first pixel."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return nn.functional.one_hot(images[:, 0, 0, 0].mul(255).round().long(), 3).float()


def image_set(predicted, labels) -> ImageSet:
    images = torch.tensor(predicted, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64), ("a", "b", "c"))


def scores(ca=0.9, asr=1.0):
    return Scores(
        Proportion(round(ca * 1000), 1000),
        Proportion(round(asr * 1000), 1000),
        Proportion(0, 1000),
        Proportion(1, 1),
    )


def test_closed_form():
    result = score(
        Parrot(),
        image_set([0, 0, 1, 2, 2], [0, 1, 1, 2, 0]),
        image_set([0, 0, 1, 2], [1, 2, 1, 1]),
        TARGET,
    )
    assert result.clean_accuracy == Proportion(3, 5)
    assert result.attack_success_rate == Proportion(2, 4)
    assert result.robust_accuracy == Proportion(1, 4)
    assert result.target_class_accuracy == Proportion(1, 2)
    assert result.flat() == {
        "clean_accuracy": 0.6,
        "attack_success_rate": 0.5,
        "robust_accuracy": 0.25,
        "target_class_accuracy": 0.5,
    }


def test_all_to_all_counts_the_next_class():
    result = score(
        Parrot(), image_set([0, 1, 1], [0, 1, 2]), image_set([1, 2, 0, 2], [0, 1, 2, 2]), None
    )
    assert result.attack_success_rate == Proportion(3, 4)
    assert result.robust_accuracy == Proportion(1, 4)
    assert result.target_class_accuracy == result.clean_accuracy == Proportion(2, 3)


def test_evaluation_sets_score_and_shorten():
    sets = EvaluationSets(
        image_set([0, 0, 1, 2, 2], [0, 1, 1, 2, 0]), image_set([0, 2, 1], [1, 1, 2]), TARGET
    )
    assert sets.score(Parrot()) == score(Parrot(), sets.clean, sets.triggered, TARGET)
    first = sets.first(4)
    assert first.clean.labels.tolist() == [0, 1, 1, 2]
    assert first.triggered.labels.tolist() == [1, 1, 2]
    assert first.target == TARGET


@pytest.mark.parametrize(
    "before, after, der",
    [
        ((0.9, 1.0), (0.9, 1.0), 0.5),  # no effect
        ((0.9, 1.0), (0.9, 0.0), 1.0),  # perfect
        ((0.9, 1.0), (0.8, 0.0), 0.95),  # the cost is subtracted
        ((0.9, 1.0), (0.4, 1.0), 0.25),
        ((0.9, 0.5), (0.95, 0.9), 0.5),  # neither a gain in accuracy nor a loss in ASR counts
        ((1.0, 0.0), (0.0, 0.0), 0.0),
    ],
)
def test_der(before, after, der):
    assert defense_effectiveness(scores(*before), scores(*after)) == pytest.approx(der)


def test_class_shares_leave_out_the_images_of_the_class_itself():
    predicted, labels = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 1, 2])
    assert class_shares(predicted, labels, 4).tolist() == pytest.approx([2 / 4, 1 / 3, 0, 0])
    zeros = torch.zeros(3, dtype=torch.int64)
    assert class_shares(zeros, zeros, 2).tolist() == [0, 0], "one class only"


@pytest.mark.parametrize("hits, n", [(5, 10), (0, 20), (20, 20), (8130, 9000)])
def test_wilson_interval(hits, n):
    """Wilson, 1927, solved by hand for z = 1.96."""
    z = 1.959964
    p = hits / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = Proportion(hits, n).interval()
    assert low == pytest.approx((middle - half) / (1 + z * z / n), abs=1e-6)
    assert high == pytest.approx((middle + half) / (1 + z * z / n), abs=1e-6)


def test_a_known_wilson_interval():
    assert Proportion(5, 10).interval() == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_a_fraction_of_nothing_is_not_a_number():
    assert math.isnan(Proportion(0, 0).value)
    assert all(math.isnan(end) for end in Proportion(0, 0).interval())


@pytest.mark.parametrize(
    "ca, asr, benign, reason",
    [
        (0.90, 0.95, 0.91, ""),
        (0.89, 0.90, 0.91, ""),  # both at their limits
        (0.90, 0.85, 0.91, "ASR 0.850 is below 0.9"),
        (0.88, 0.95, 0.91, "CA 0.880 is more than 0.02 below the benign model's 0.910"),
    ],
)
def test_the_gate(ca, asr, benign, reason):
    assert gate_failure(scores(ca, asr), benign, 0.9) == reason


def test_the_early_loss_of_each_image(toy_model, toy_set, rng):
    """Two of ten passes count.

    With a step size that changes nothing and all images in one batch, both give the same loss.
    """
    data = toy_set(24)
    model = toy_model()
    losses = EarlyLossRecorder(len(data), 10, torch.device("cpu"))
    recipe = TrainWithLosses(
        losses=losses,
        epochs=10,
        batch_size=24,
        lr=1e-12,
        weight_decay=0.0,
        augment=Augment(crop=0, flip=False),
        label_smoothing=0.3,
    )
    recipe(model, data, rng=rng())
    expected = F.cross_entropy(model.train()(data.as_floats()), data.labels, reduction="none")
    assert losses.times.tolist() == [2] * 24
    assert torch.allclose(losses.mean(), expected.detach(), atol=1e-5)


def test_later_losses_do_not_count():
    losses = EarlyLossRecorder(3, 4, torch.device("cpu"))  # one pass of four
    for logit in (0.0, 50.0):
        losses(
            torch.tensor([2, 0]), torch.tensor([0, 1]), torch.tensor([[logit, 0.0], [0.0, logit]])
        )
    assert losses.mean()[[0, 2]].tolist() == pytest.approx([math.log(2)] * 2)
    assert losses.mean()[1].isnan()


def test_the_paired_interval_in_closed_form():
    """(12 - 5) / 102 with a variance of (17 / 102 - (7 / 102)^2) / 102."""
    low, high = paired_interval(11, 4, 100)
    half = 1.959964 * ((17 / 102 - (7 / 102) ** 2) / 102) ** 0.5
    assert (low, high) == pytest.approx((7 / 102 - half, 7 / 102 + half))
    low, high = paired_interval(0, 0, 10)
    assert low == -high and high > 0, "no image turned, yet ten do not prove that none would"
