"""The experiment on published checkpoints: its cases, and its table."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from experiments import foreign
from rnp.data.cifar10 import Cifar10
from rnp.types import ImageSet


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def small(num_classes):
    return Net()


def white_corner(images):
    images = images.copy()
    images[:, :4, :4] = 255
    return images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    nets = types.ModuleType("nets")
    nets.small = small
    nets.FOREIGN = {
        "a.safetensors": (small, None, 0.5, 0.5, white_corner, 3),
        "b.safetensors": (small, None, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), None, None),
    }
    monkeypatch.setitem(sys.modules, "nets", nets)
    monkeypatch.setattr("rnp.models.build.REGISTERED", {})
    for name in nets.FOREIGN:
        save_file(Net().state_dict(), tmp_path / name)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (800, 3, 32, 32), generator=generator, dtype=torch.uint8)
    tests = ImageSet(images, torch.arange(800) % 10, tuple("0123456789"))
    monkeypatch.setattr(Cifar10, "load", lambda *_, **__: (tests, tests))
    return tmp_path


def keys(images):
    return {image.numpy().tobytes() for image in images}


def test_the_defender_and_the_scores_share_no_image(folder):
    case = foreign.load_case(folder, "a.safetensors", seed=1)
    defender = keys(case.defense_set.all.images)
    assert len(defender) == 500 and len(case.clean) == 300
    assert not defender & keys(case.clean.images)
    other = foreign.load_case(folder, "a.safetensors", seed=2)
    assert defender != keys(other.defense_set.all.images)


def test_triggered_images_are_of_the_other_classes(folder):
    sets = foreign.load_case(folder, "a.safetensors", seed=0).sets
    assert sets is not None and sets.target == 3 and not (sets.triggered.labels == 3).any()
    stamped = sets.triggered.images.numpy()
    assert (stamped[:, :, :4, :4] == 255).all() and (stamped[:, :, 4:] < 200).all()
    assert foreign.load_case(folder, "b.safetensors", seed=0).sets is None


def test_a_scalar_normalization_holds_for_every_channel():
    assert foreign.per_channel(0.5) == (0.5, 0.5, 0.5)
    assert foreign.per_channel((0.1, 0.2, 0.3)) == (0.1, 0.2, 0.3)


def row(model, target, tuned, asr):
    rates = {f"{name}{step}": "0.5" for step in foreign.STEPS for name in foreign.MEASURES}
    rates["attack_success_rate"] = asr
    numbers = {"unlearn_steps": "", "neurons_pruned": "3", "neurons": "40", "seconds": "9"}
    return {"model": model, "target": target, "tuned_labels": tuned} | rates | numbers


def test_the_summary_has_a_line_for_each_checkpoint():
    rows = [row("a", "3", "1 3", "0.2"), row("a", "3", "", "0.4"), row("b", "", "5", "")]
    _, _, a, b = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in foreign.summary(rows)
    )
    values = dict(zip(foreign.HEADINGS, a))
    assert values["ASR"] == "0.300" and values["worst ASR"] == "0.400"
    assert values["label right"] == "1 of 2" and values["steps"] == "–"
    assert dict(zip(foreign.HEADINGS, b))["label right"] == "1 accused"
    assert values["CA"] == "0.500"
