"""What every detector guarantees: tested for each file of the three families."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from planted import CLASSES, images, rng
from torch import nn

from rnp.detection.base import LabelDetector, SampleDetector, TriggerRecovery
from rnp.params.fields import iter_hyperparameters
from rnp.registry import load, names

FAMILIES = {"triggers": TriggerRecovery, "labels": LabelDetector, "samples": SampleDetector}
METHODS = [(family, name) for family in FAMILIES for name in names(family)]


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, CLASSES),
        )  # in train mode


def results(
    family: str, name: str, model: nn.Module, unlearned: nn.Module, seed: int
) -> list[torch.Tensor]:
    """The results of the method, as tensors."""
    method = load(family, name)()
    clean = images()
    if family == "triggers":
        return [
            torch.cat([t.mask.flatten(), t.pattern.flatten()])
            for t in method.recover(model, clean, rng=rng(seed))
        ]
    if family == "labels":
        return [method.score(model, clean, rng=rng(seed))]
    return [
        method.score(model, images(20, seed=1).images, clean, rng=rng(seed), unlearned=unlearned)
    ]


@pytest.mark.parametrize("family, name", METHODS)
def test_it_is_a_frozen_dataclass_with_a_help_text_per_field(family: str, name: str) -> None:
    cls = load(family, name)
    assert issubclass(cls, FAMILIES[family]) and cls().name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().name_of_nothing = 1
    assert all(each.text for each in iter_hyperparameters(cls))


@pytest.mark.parametrize("family, name", METHODS)
def test_one_result_per_class_or_image_repeatable_and_without_side_effects(
    family: str, name: str
) -> None:
    model = network()
    unlearned = network()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    first = results(family, name, model, unlearned, seed=5)
    again = results(family, name, model, unlearned, seed=5)
    assert len(first if family == "triggers" else first[0]) == (
        20 if family == "samples" else CLASSES
    )
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, again, strict=True))
    assert model.training and unlearned.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
