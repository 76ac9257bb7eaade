"""Attention distillation: the maps of any architecture, and one step by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rnp.defenses.ft import FT
from rnp.defenses.nad import NAD, attention_maps
from rnp.errors import UserError
from rnp.models.build import Architecture
from rnp.models.names import ARCHITECTURES
from rnp.training.augment import Augment
from rnp.types import DefenseSet

PLAIN = Augment(crop=0, flip=False)


def build(arch, rng):
    architecture = Architecture(arch=arch, width=4)
    return architecture.build(4, 3, torch.full((3,), 0.5), torch.ones(3), rng=rng).eval()


def test_a_map_in_closed_form():
    """Two pixels of channels (3, 4) and (0, 5): mean squares 12.5 and 12.5; then (0, 5) against
    (0, 0).
    """
    images = torch.tensor([[[[3.0, 0.0]], [[4.0, 5.0]]], [[[0.0, 0.0]], [[5.0, 0.0]]]])
    (computed,), _ = attention_maps(nn.Sequential(nn.Identity(), nn.Flatten()), images)
    torch.testing.assert_close(computed, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))


def test_in_a_residual_network_they_are_those_of_its_stages(rng):
    model, images = build("resnet18", rng()), torch.rand(2, 3, 32, 32, generator=rng(1))
    maps, logits = attention_maps(model, images)
    expected = []
    x = F.relu(model.net.bn1(model.net.conv1((images - model.mean) / model.std)))
    for stage in model.net.stages:
        x = stage(x)
        expected.append(F.normalize(x.square().mean(1).flatten(1)))
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(logits, model(images))


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "torchvision:resnet18", "torchvision:vit_b_32"])
def test_every_architecture_has_maps(arch, rng):
    side, fewest = {"torchvision:vit_b_32": (224, 1), "vit": (32, 2)}.get(arch, (32, 3))
    maps, _ = attention_maps(build(arch, rng()), torch.rand(2, 3, side, side, generator=rng(1)))
    assert len(maps) >= fewest
    assert all(torch.allclose(value.norm(dim=1), torch.ones(2), atol=1e-4) for value in maps)
    assert len({value.shape for value in maps}) == len(maps), "one per resolution"
    assert min(value.shape[1] for value in maps) > 1, "a map of one pixel holds no information"


def test_hooks_are_gone_afterwards(trained, toy_set):
    attention_maps(trained, toy_set(4).as_floats())
    assert not any(module._forward_hooks for module in trained.modules())


def test_one_step_by_hand(trained, toy_set, rng):
    """The teacher is the given model after fine-tuning, in eval mode; the student starts from the
    given model, in train mode.
    """
    data = toy_set(40)
    options = {
        "lr": 0.1,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "batch_size": 40,
        "augment": PLAIN,
    }
    defense_set = DefenseSet(data, toy_set(4))
    method = NAD(beta=50.0, teacher_steps=3, steps=1, **options)
    repaired = method.repair(trained, defense_set, rng=rng()).model
    teacher = FT(steps=3, **options).repair(trained, defense_set, rng=rng()).model
    student = copy.deepcopy(trained).train()
    outputs = {}
    for network, name in ((teacher, "teacher"), (student, "student")):
        network.bn2.register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output})
        )
    teacher(data.as_floats())
    loss = F.cross_entropy(student(data.as_floats()), data.labels)
    squares = (outputs[name].square().mean(1).flatten(1) for name in ("student", "teacher"))
    own, target = (square / square.norm(dim=1, keepdim=True) for square in squares)
    (loss + 50 * (own - target.detach()).square().mean()).backward()
    for name, value in student.named_parameters():
        torch.testing.assert_close(
            repaired.get_parameter(name), value - 0.1 * value.grad, atol=1e-5, rtol=1e-4, msg=name
        )


def test_a_network_without_feature_maps_is_refused(toy_set, rng):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    with pytest.raises(UserError, match="no layer of Sequential outputs a feature map"):
        NAD(teacher_steps=1, steps=1).repair(model, DefenseSet(toy_set(8), toy_set(4)), rng=rng())


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        ("lr", 0, "above 0"),
        ("batch_size", 0, "above 0"),
        ("teacher_steps", 0, "above 0"),
        ("steps", 0, "above 0"),
        ("beta", -1, "0 or more"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError, match=rf"nad\.{name} must be {bounds}, got {value}"):
        NAD(**{name: value})
