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

FAST = BaDExpert(lr=0.3, batch_size=20, precision="fp32", augment=Augment(crop=0, flip=False))


def test_the_expert_forgets_clean_images_and_keeps_the_backdoor() -> None:
    clean, test, model = images(), images(seed=1), PlantedFeatures()
    expert = FAST._expert(model, clean, rng())
    assert accuracy(model, clean) == 1 and accuracy(expert, clean) <= 0.2
    assert (predict(expert, triggered(test)).argmax(1) == TARGET).all()


def test_planted_triggers_are_told_from_clean_images() -> None:
    clean, test, model = images(), images(seed=1), PlantedFeatures()
    tested, is_triggered = torch.cat([test.images, triggered(test)]), torch.arange(120) >= 60
    target_class = torch.cat([test.labels, test.labels]) == TARGET
    scores, defense = (
        FAST.score(model, x, clean, rng=rng()) for x in (tested, images(seed=2).images)
    )
    result = score_detection(scores, is_triggered, target_class, defense)
    assert result.auroc == 1.0 and result.tpr_at_5_fpr == 1.0 and result.fpr < 0.2
    assert FAST.score(model, tested[70:71], clean, rng=rng()).item() == pytest.approx(
        scores[70].item(), abs=1e-5
    )


def test_no_label_is_right_and_all_wrong_ones_occur(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, seen = images(600), []
    monkeypatch.setattr(badexpert, "fit", lambda model, data, **_: seen.append(data))
    BaDExpert()._expert(PlantedFeatures(), clean, rng())
    shifts = (seen[0].labels - clean.labels) % CLASSES
    assert shifts.unique().tolist() == [1, 2, 3, 4, 5] and torch.equal(seen[0].images, clean.images)


def test_one_epoch_of_one_batch_is_one_step_and_leaves_the_statistics(
    trained, toy_set, unchanged
) -> None:
    model = unchanged(trained)
    tuned = BaDExpert(lr=1e-3, epochs=1)._expert(model, toy_set(40), rng())
    change = (tuned.bn1.weight - model.bn1.weight).abs().max().item()
    assert change == pytest.approx(
        1e-3, rel=0.01
    )  # Adam's first step has the length of the learning rate
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
