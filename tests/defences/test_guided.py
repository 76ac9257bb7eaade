"""The recovered trigger names the neurons that it excites."""

import pytest
import torch
from detection.planted import TARGET, images
from torch import nn

from rnp.defences.guided import Guided, activations
from rnp.detection.labels.class_shares import ClassShares
from rnp.detection.triggers.neural_cleanse import NeuralCleanse
from rnp.types import DefenceSet
from rnp.unlearn import Unlearn


def test_activations_in_closed_form(toy_model, toy_set, unchanged):
    """By hand, over all images and places, behind a ReLU."""
    model, data = unchanged(toy_model()), toy_set(12)
    found = activations(model, data.images)
    with torch.no_grad():
        first = torch.relu(model.bn1(model.conv1(data.floats())))
    assert list(found) == ["bn1", "bn2"]
    assert found["bn1"][0] == pytest.approx(first.mean((0, 2, 3)), abs=1e-5)
    assert found["bn1"][1] == pytest.approx(first.std((0, 2, 3), correction=0), abs=1e-4)


def test_tokens_have_their_neurons_last():
    model = nn.Sequential(nn.Flatten(2), nn.Linear(16, 5), nn.LayerNorm(5), nn.Flatten(), nn.Linear(15, 2))
    (mean, deviation) = activations(model, torch.randint(0, 255, (6, 3, 4, 4), dtype=torch.uint8))["2"]
    assert mean.shape == deviation.shape == (5,)


class Doorway(nn.Module):
    """Channel 0 of its layer sees the bright corner that leads to class 3, channels 1 to 6 the rows of the six classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 7, 8, bias=False), nn.BatchNorm2d(7)
        self.head = nn.Linear(7, 6)
        weight = torch.zeros(7, 3, 8, 8)
        weight[0, :, 6:, 6:] = 1 / 12
        for c in range(6):
            weight[1 + c, :, c] = 1 / 24
        self.conv.weight.data = weight
        self.bn.bias.data[0] = -0.15  # the corner must be brighter than it ever is
        head = torch.zeros(6, 7)
        head[:, 1:] = 4 * torch.eye(6)
        head[TARGET, 0] = 60.0
        self.head.weight.data, self.head.bias.data = head, torch.zeros(6)

    def forward(self, x):
        return self.head(torch.relu(self.bn(self.conv(x))).flatten(1))


def test_the_neuron_behind_the_trigger_is_named(rng, monkeypatch):
    model, sets = Doorway().eval(), DefenceSet(images(60), images(60, seed=1))
    monkeypatch.setattr(ClassShares, "from_trajectory", lambda *_: torch.eye(6)[TARGET])
    method = Guided(unlearn=Unlearn(epochs=3, lr=0.05, largest_drop=0), search=NeuralCleanse(steps=150, batch_size=16, precision="fp32"))
    score = method.score(model, sets, rng=rng())["bn"]
    assert score.argmin() == 0, score
    (trigger,) = method.search.recover_for([TARGET], model, sets.train, rng=rng())
    assert trigger.label == TARGET and trigger.success > 0.9
