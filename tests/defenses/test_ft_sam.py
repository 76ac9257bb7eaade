"""Sharpness-aware fine-tuning: the gradient at the worst point nearby, applied to the weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from rnp.defenses.ft import FT
from rnp.defenses.ft_sam import FTSAM, ascend
from rnp.errors import UserError
from rnp.training.augment import Augment
from rnp.types import DefenseSet

PLAIN = Augment(crop=0, flip=False)


def test_the_ascent_in_closed_form():
    """w * g = (3, 4) has norm 5; the change is rho / 5 * w^2 * g, and relative to w its norm is
    rho.
    """
    start = {
        "a": torch.tensor([1.0], requires_grad=True),
        "b": torch.tensor([2.0], requires_grad=True),
    }
    end = ascend(start, (torch.tensor([3.0]), torch.tensor([2.0])), rho=0.5)
    assert end["a"].item() == pytest.approx(1.3)
    assert end["b"].item() == pytest.approx(2.8)
    (end["a"] * 7 + end["b"] * 5).backward()
    gradients = start["a"].grad.item(), start["b"].grad.item()
    assert gradients == (7, 5), "the change is a constant to autograd"


def test_two_steps_by_hand(trained, toy_set, rng):
    """Weights moved uphill in place, gradients taken there, weights put back; the statistics
    follow the first pass.
    """
    data = toy_set(40)
    method = FTSAM(
        rho=0.5,
        label_smoothing=0.2,
        lr=0.1,
        momentum=0.0,
        weight_decay=0.0,
        batch_size=40,
        steps=2,
        augment=PLAIN,
    )
    repaired = method.repair(trained, DefenseSet(data, toy_set(4)), rng=rng()).model
    model = copy.deepcopy(trained).train()

    def gradients(weights):
        logits = model(data.as_floats())
        loss = F.cross_entropy(logits, data.labels, label_smoothing=0.2)
        return torch.autograd.grad(loss, weights)

    for lr in (0.1, 0.05):
        weights = list(model.parameters())
        here = [w.detach().clone() for w in weights]
        first = gradients(weights)
        statistics = {name: value.clone() for name, value in model.named_buffers()}
        norm = torch.cat([(w * g).flatten() for w, g in zip(here, first)]).norm()
        with torch.no_grad():
            for w, g in zip(weights, first):
                w += 0.5 * w**2 * g / norm
        second = gradients(weights)
        with torch.no_grad():
            for w, start, g in zip(weights, here, second):
                w.copy_(start - lr * g)
            for name, value in model.named_buffers():
                value.copy_(statistics[name])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            repaired.state_dict()[name], value, atol=1e-5, rtol=1e-4, msg=name
        )


def test_without_a_neighborhood_it_is_fine_tuning(trained, toy_set, rng):
    defense_set = DefenseSet(toy_set(40), toy_set(4))
    options = {"steps": 5, "batch_size": 8}
    sam = FTSAM(rho=0, label_smoothing=0, **options)
    one = sam.repair(trained, defense_set, rng=rng()).model.state_dict()
    other = FT(**options).repair(trained, defense_set, rng=rng()).model.state_dict()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name])


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        ("lr", 0, "above 0"),
        ("batch_size", 0, "above 0"),
        ("steps", 0, "above 0"),
        ("rho", -1, "0 or more"),
        ("label_smoothing", 1, r"in \[0, 1\)"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError, match=rf"ft_sam\.{name} must be {bounds}, got {value}"):
        FTSAM(**{name: value})
