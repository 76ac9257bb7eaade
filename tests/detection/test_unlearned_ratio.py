from __future__ import annotations

import pytest
import torch
from planted import TARGET, Planted, images, rng, triggered
from torch import Tensor

from rnp.detection.base import score_detection
from rnp.detection.samples.unlearned_ratio import UnlearnedRatio, log_ratio
from rnp.errors import UserError
from rnp.training.predict import predict


def score(candidates: Tensor, unlearned: Planted) -> Tensor:
    return UnlearnedRatio().score(Planted(), candidates, images(), rng=rng(), unlearned=unlearned)


def test_it_is_the_log_ratio_of_the_confidences_after_and_before() -> None:
    clean = images()
    unlearned = Planted(bias=2.0)
    after, before = (
        # The predictions of the planted model are the labels.
        predict(model, clean.images).softmax(1)[torch.arange(60), clean.labels]
        for model in (unlearned, Planted())
    )
    scores = score(clean.images, unlearned)
    assert scores.tolist() == pytest.approx((after / before).log().tolist(), abs=1e-5)
    alone = score(clean.images[2:3], unlearned)
    assert alone.item() == pytest.approx(scores[2].item(), abs=1e-6)


def test_an_unchanged_model_has_a_ratio_of_one() -> None:
    assert log_ratio(Planted(), Planted(), images().images).tolist() == [0.0] * 60


def test_planted_triggers_are_separated_from_clean_images() -> None:
    test = images(seed=1)
    scores = score(torch.cat([test.images, triggered(test)]), Planted(bias=4.0))
    clean_scores = score(images().images, Planted(bias=4.0))
    is_triggered = torch.arange(120) >= 60
    # In the target class the confidence in clean images only grows.
    others = is_triggered | (torch.cat([test.labels, test.labels]) != TARGET)
    positives = is_triggered[others]
    assert score_detection(scores[others], positives, positives, clean_scores).auroc == 1.0


def test_the_unlearned_model_is_required() -> None:
    with pytest.raises(UserError, match="unlearn"):
        UnlearnedRatio().score(Planted(), images().images, images(), rng=rng())
