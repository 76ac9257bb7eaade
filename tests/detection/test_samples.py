from __future__ import annotations

import math

import pytest
import torch
from planted import TARGET, Planted, images, rng, triggered

from rnp.detection.base import score_detection
from rnp.detection.samples.strip import Strip, entropy
from rnp.detection.samples.unlearned_confidence import UnlearnedConfidence
from rnp.errors import UserError
from rnp.training.predict import predict


def test_entropy_in_bits_of_known_predictions() -> None:
    logits = torch.tensor([[0.0] * 4, [1e4, 0.0, 0.0, 0.0], [1e4, 1e4, 0.0, 0.0]])
    assert entropy(logits).tolist() == pytest.approx([2.0, 0.0, 1.0], abs=1e-6)
    skewed = torch.tensor([[math.log(3.0), 0.0]])
    assert entropy(skewed).item() == pytest.approx(2 - 0.75 * math.log2(3))


def test_strip_is_the_mean_over_half_and_half_blends() -> None:
    clean = images()
    tested = images(7, seed=1)
    overlays = clean.as_floats()[torch.randint(len(clean), (4,), generator=rng())]
    expected = [
        -entropy(predict(Planted(), (image + overlays) / 2)).mean().item()
        for image in tested.as_floats()
    ]
    scores, alone = (
        Strip(overlays=4).score(Planted(), part, clean, rng=rng())
        for part in (tested.images, tested.images[2:3])
    )
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert alone.item() == pytest.approx(scores[2].item(), abs=1e-6)


def test_the_confidence_is_that_of_the_unlearned_model_in_the_prediction() -> None:
    clean = images()
    unlearned = Planted(bias=2.0)
    scores = UnlearnedConfidence().score(
        Planted(), clean.images, clean, rng=rng(), unlearned=unlearned
    )
    # The predictions of the planted model are the labels.
    confidences = predict(unlearned, clean.images).softmax(1)[torch.arange(60), clean.labels]
    assert torch.equal(scores, confidences)


def test_the_unlearned_model_is_required() -> None:
    with pytest.raises(UserError, match="unlearn"):
        UnlearnedConfidence().score(Planted(), images().images, images(), rng=rng())


@pytest.mark.parametrize("detector", [Strip(), UnlearnedConfidence()], ids=lambda d: d.name)
def test_planted_triggers_are_separated(detector: Strip | UnlearnedConfidence) -> None:
    clean = images()
    test = images(seed=1)
    target_class = torch.cat([test.labels, test.labels]) == TARGET
    scores, clean_scores = (
        detector.score(Planted(), part, clean, rng=rng(), unlearned=Planted(bias=4.0))
        for part in (torch.cat([test.images, triggered(test)]), clean.images)
    )
    result = score_detection(scores, torch.arange(120) >= 60, target_class, clean_scores)
    assert result.auroc > 0.95 and result.tpr_at_5_fpr > 0.9 and result.fpr < 0.2


def test_strip_needs_an_overlay() -> None:
    with pytest.raises(UserError, match=r"overlays.*0"):
        Strip(overlays=0)
