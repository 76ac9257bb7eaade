from __future__ import annotations

import pytest
import torch
from planted import TARGET, Planted, images, rng, triggered

from rnp.detection.base import score_detection
from rnp.detection.samples.unlearned_ratio import UnlearnedRatio, log_ratio
from rnp.errors import UserError
from rnp.training.predict import predict


def test_it_is_the_log_of_the_share_of_confidence_that_is_left() -> None:
    model, unlearned, clean = Planted(), Planted(bias=2.0), images()
    chosen = torch.arange(len(clean)), clean.labels  # `model` never errs
    left = (
        predict(unlearned, clean.images).softmax(1)[chosen]
        / predict(model, clean.images).softmax(1)[chosen]
    )
    scores = UnlearnedRatio().score(model, clean.images, clean, rng=rng(), unlearned=unlearned)
    assert scores.tolist() == pytest.approx(left.log().tolist(), abs=1e-5)
    alone = UnlearnedRatio().score(model, clean.images[2:3], clean, rng=rng(), unlearned=unlearned)
    assert alone.item() == pytest.approx(scores[2].item(), abs=1e-6)


def test_an_unchanged_model_keeps_everything() -> None:
    assert log_ratio(Planted(), Planted(), images().images).tolist() == [0.0] * 60


def test_planted_triggers_are_told_from_clean_images() -> None:
    clean, test = images(), images(seed=1)
    tested, is_triggered = torch.cat([test.images, triggered(test)]), torch.arange(120) >= 60
    scores, defense = (
        UnlearnedRatio().score(Planted(), x, clean, rng=rng(), unlearned=Planted(bias=4.0))
        for x in (tested, clean.images)
    )
    others = is_triggered | (
        torch.cat([test.labels, test.labels]) != TARGET
    )  # clean ones of the target only gain
    assert (
        score_detection(scores[others], is_triggered[others], is_triggered[others], defense).auroc
        == 1.0
    )


def test_it_asks_for_the_unlearned_model() -> None:
    with pytest.raises(UserError, match="unlearn"):
        UnlearnedRatio().score(Planted(), images().images, images(), rng=rng())
