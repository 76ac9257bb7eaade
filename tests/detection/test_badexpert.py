from __future__ import annotations

import pytest
import torch
from planted import CLASSES, TARGET, PlantedFeatures, images, rng, triggered

from rnp.detection.base import score_detection
from rnp.detection.samples import badexpert
from rnp.detection.samples.badexpert import BaDExpert
from rnp.errors import UserError
from rnp.training.augment import Augment
from rnp.training.predict import accuracy, predict

FAST = BaDExpert(lr=0.3, batch_size=20, augment=Augment(crop=0, flip=False))


def test_the_expert_forgets_clean_images_and_keeps_the_backdoor() -> None:
    clean = images()
    model = PlantedFeatures()
    expert = FAST._tune_expert(model, clean, rng())
    assert accuracy(model, clean) == 1
    assert accuracy(expert, clean) <= 0.2
    assert (predict(expert, triggered(images(seed=1))).argmax(1) == TARGET).all()


def test_planted_triggers_are_separated_from_clean_images() -> None:
    test = images(seed=1)
    tested = torch.cat([test.images, triggered(test)])
    target_class = torch.cat([test.labels, test.labels]) == TARGET

    def score(candidates: torch.Tensor) -> torch.Tensor:
        return FAST.score(PlantedFeatures(), candidates, images(), rng=rng())

    scores = score(tested)
    clean_scores = score(images(seed=2).images)
    result = score_detection(scores, torch.arange(120) >= 60, target_class, clean_scores)
    assert result.auroc == 1.0 and result.tpr_at_5_fpr == 1.0 and result.fpr < 0.2
    assert score(tested[70:71]).item() == pytest.approx(scores[70].item(), abs=1e-5)


def test_no_label_is_right_and_all_wrong_ones_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = images(600)
    data = []
    monkeypatch.setattr(badexpert, "fit", lambda _, wrong, **__: data.append(wrong))
    BaDExpert()._tune_expert(PlantedFeatures(), clean, rng())
    shifts = (data[0].labels - clean.labels) % CLASSES
    assert shifts.unique().tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(data[0].images, clean.images)


def test_one_epoch_of_one_batch_is_one_step_and_leaves_the_statistics(
    trained, toy_set, unchanged
) -> None:
    model = unchanged(trained)
    tuned = BaDExpert(lr=1e-3, epochs=1)._tune_expert(model, toy_set(40), rng())
    change = (tuned.bn1.weight - model.bn1.weight).abs().max().item()
    # Adam's first step has the length of the learning rate.
    assert change == pytest.approx(1e-3, rel=0.01)
    assert torch.equal(tuned.bn1.running_mean, model.bn1.running_mean)


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", 0.0),
        ("batch_size", 0),
        ("epochs", 0),
        ("stop_accuracy", 20.0),
        ("stop_accuracy", 0.0),
    ],
)
def test_out_of_range_fields_are_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}.*{value:g}"):
        BaDExpert(**{field: value})
