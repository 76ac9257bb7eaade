"""Feature shift tuning: a fresh classifier of the old norm, pushed away from the old one."""

import copy

import pytest
import torch
import torch.nn.functional as F

from rnp.defenses.fst import FST, reset
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
        alpha=0.5,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        batch_size=40,
        steps=1,
        precision="fp32",
        augment=PLAIN,
    )
    repaired = method.repair(trained, DefenseSet(data, toy_set(4)), rng=rng()).model
    model, old = copy.deepcopy(trained).train(), trained.fc.weight.detach()
    reset(model.fc, rng())
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


def test_the_classifier_starts_afresh(trained, toy_set, rng):
    repaired = (
        FST(lr=1e-9, steps=1).repair(trained, DefenseSet(toy_set(40), toy_set(4)), rng=rng()).model
    )
    assert cosine(repaired, trained) < 0.6 and not torch.equal(repaired.fc.bias, trained.fc.bias)
    torch.testing.assert_close(repaired.conv1.weight, trained.conv1.weight)


def test_alpha_turns_the_classifier_round_and_the_features_follow(trained, toy_set, rng):
    near, far = (
        FST(alpha=alpha, steps=200, batch_size=8, lr=0.05, augment=PLAIN, precision="fp32")
        .repair(trained, DefenseSet(toy_set(80), toy_set(4)), rng=rng())
        .model
        for alpha in (0.0, 0.2)
    )
    assert cosine(far, trained) < -0.5 < 0.4 < cosine(near, trained)
    assert far.fc.weight.norm().item() == pytest.approx(trained.fc.weight.norm().item(), rel=1e-4)
    assert accuracy(far, toy_set(80, seed=9)) > 0.9, (
        "with the old features such a classifier would be wrong"
    )


@pytest.mark.parametrize("name, value", [("lr", 0), ("batch_size", 0), ("steps", 0), ("alpha", -1)])
def test_impossible_settings_are_refused(name, value):
    with pytest.raises(UserError, match=rf"fst\.{name} must be .*, got {value}"):
        FST(**{name: value})
