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
    model, clean, tested = Planted(), images(), images(7, seed=1)
    drawn = torch.randint(len(clean), (4,), generator=rng())
    expected = [
        -sum(entropy(predict(model, (one + clean.as_floats()[i]) / 2)[0:1]).item() for i in drawn)
        / 4
        for one in tested.as_floats().split(1)
    ]
    scores = Strip(overlays=4).score(model, tested.images, clean, rng=rng())
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    alone = Strip(overlays=4).score(model, tested.images[2:3], clean, rng=rng())
    assert alone.item() == pytest.approx(scores[2].item(), abs=1e-6)


def test_confidence_is_what_the_unlearned_model_leaves_of_a_prediction() -> None:
    model, unlearned, clean = Planted(), Planted(bias=2.0), images()
    scores = UnlearnedConfidence().score(model, clean.images, clean, rng=rng(), unlearned=unlearned)
    kept = predict(unlearned, clean.images).softmax(1)[
        torch.arange(len(clean)), clean.labels
    ]  # `model` never errs
    assert torch.equal(scores, kept)


def test_confidence_asks_for_the_unlearned_model() -> None:
    with pytest.raises(UserError, match="unlearn"):
        UnlearnedConfidence().score(Planted(), images().images, images(), rng=rng())


@pytest.mark.parametrize("detector", [Strip(), UnlearnedConfidence()], ids=lambda d: d.name)
def test_planted_triggers_are_told_from_clean_images(detector: Strip | UnlearnedConfidence) -> None:
    clean, test = images(), images(seed=1)
    tested = torch.cat([test.images, triggered(test)])
    is_triggered = torch.arange(len(tested)) >= len(test)
    target_class = torch.cat([test.labels, test.labels]) == TARGET
    unlearned = Planted(bias=4.0)
    scores, defense = (
        detector.score(Planted(), x, clean, rng=rng(), unlearned=unlearned)
        for x in (tested, clean.images)
    )
    result = score_detection(scores, is_triggered, target_class, defense)
    assert result.auroc > 0.95 and result.tpr_at_5_fpr > 0.9 and result.fpr < 0.2


def test_strip_needs_an_overlay() -> None:
    with pytest.raises(UserError, match=r"overlays.*0"):
        Strip(overlays=0)
