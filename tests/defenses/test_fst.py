"""Feature shift tuning: a new classifier of the old norm, pushed away from the old one."""

import copy

import pytest
import torch
import torch.nn.functional as F

from rnp.defenses.fst import FST, reinitialize
from rnp.errors import UserError
from rnp.training.augment import Augment
from rnp.training.predict import accuracy
from rnp.types import DefenseSet

PLAIN = Augment(crop=0, flip=False)


def cosine(model, other):
    return F.cosine_similarity(model.fc.weight.flatten(), other.fc.weight.flatten(), dim=0).item()


def test_one_step_by_hand(trained, toy_set, rng):
    """The push has the gradient alpha * w_old, and the step ends with the norm of w_old."""
    data = toy_set(40)
    method = FST(
        alpha=0.5, lr=0.1, momentum=0.0, weight_decay=0.0, batch_size=40, steps=1, augment=PLAIN
    )
    repaired = method.repair(trained, DefenseSet(data, toy_set(4)), rng=rng()).model
    model = copy.deepcopy(trained).train()
    old = trained.fc.weight.detach()
    reinitialize(model.fc, rng=rng())
    with torch.no_grad():
        model.fc.weight *= old.norm() / model.fc.weight.norm()
    F.cross_entropy(model(data.as_floats()), data.labels).backward()
    with torch.no_grad():
        model.fc.weight.grad += 0.5 * old
        for value in model.parameters():
            value -= 0.1 * value.grad
        model.fc.weight *= old.norm() / model.fc.weight.norm()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            repaired.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name
        )


def test_the_classifier_starts_anew(trained, toy_set, rng):
    defense_set = DefenseSet(toy_set(40), toy_set(4))
    repaired = FST(lr=1e-9, steps=1).repair(trained, defense_set, rng=rng()).model
    assert cosine(repaired, trained) < 0.6
    assert not torch.equal(repaired.fc.bias, trained.fc.bias)
    torch.testing.assert_close(repaired.conv1.weight, trained.conv1.weight)


def test_alpha_reverses_the_classifier_and_the_features_follow(trained, toy_set, rng):
    near, far = (
        FST(alpha=alpha, steps=200, batch_size=8, lr=0.05, augment=PLAIN)
        .repair(trained, DefenseSet(toy_set(80), toy_set(4)), rng=rng())
        .model
        for alpha in (0.0, 0.2)
    )
    assert cosine(far, trained) < -0.5 < 0.4 < cosine(near, trained)
    assert far.fc.weight.norm().item() == pytest.approx(trained.fc.weight.norm().item(), rel=1e-4)
    assert accuracy(far, toy_set(80, seed=9)) > 0.9, (
        "with the old features such a classifier would be wrong"
    )


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        ("lr", 0, "above 0"),
        ("batch_size", 0, "above 0"),
        ("steps", 0, "above 0"),
        ("alpha", -1, "0 or more"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError, match=rf"fst\.{name} must be {bounds}, got {value}"):
        FST(**{name: value})
