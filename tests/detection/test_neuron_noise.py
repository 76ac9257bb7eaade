from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from planted import CLASSES, TARGET, Planted, images, rng
from torch import Tensor, nn

from rnp.detection.base import LabelVerdict
from rnp.detection.labels.neuron_noise import NeuronNoise
from rnp.errors import UserError
from rnp.neurons.masks import maskable


class HiddenNeuron(nn.Module):
    """Predicts the bright row; one more neuron, inactive without noise, leads to class 3.

    That neuron has a bias of -1 and an input of 0.9.
    """

    def __init__(self, strength: float = 300.0) -> None:
        super().__init__()
        self.strength = strength
        self.bn = nn.BatchNorm1d(CLASSES + 1, eps=0)
        with torch.no_grad():
            self.bn.bias[-1] = -1

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean((1, 3))[:, :CLASSES]
        neurons = self.bn(torch.cat([rows, torch.full_like(rows[:, :1], 0.9)], dim=1))
        backdoor = self.strength * F.softplus(neurons[:, CLASSES:], beta=50)  # [n, 1]
        return 10 * neurons[:, :CLASSES] + backdoor * torch.eye(CLASSES)[TARGET]


def test_noise_activates_the_planted_neuron() -> None:
    detector = NeuronNoise(copies=40)
    scores = detector.score(HiddenNeuron(), images(), rng=rng())
    assert scores[TARGET] > 0.6 and scores.sum() == scores[TARGET]
    assert detector.verdict(scores) == LabelVerdict(TARGET, scores[TARGET].item())


def test_a_neuron_without_effect_predicts_no_label() -> None:
    detector = NeuronNoise()
    scores = detector.score(HiddenNeuron(strength=0.0), images(), rng=rng())
    assert detector.verdict(scores).label is None


def test_weak_noise_never_activates_it_and_uniform_noise_sometimes() -> None:
    weak = NeuronNoise(strength=0.05).score(HiddenNeuron(), images(), rng=rng())
    uniform = NeuronNoise(copies=40, steps=0).score(HiddenNeuron(), images(), rng=rng())
    assert weak[TARGET] == 0
    assert 0.1 < uniform[TARGET] < 0.5


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_noise_stays_within_its_strength(toy_model, toy_set, steps: int) -> None:
    model = toy_model()
    detector = NeuronNoise(strength=0.3, steps=steps, batch_size=16)
    perturbed = detector._perturb(model, toy_set(20), rng())
    changes = []
    for name, layer in maskable(model).items():
        for part in ("weight", "bias"):
            before = getattr(layer, part)
            change = getattr(perturbed.get_submodule(name), part) - before
            assert (change.abs() <= 0.3 * before.abs() + 1e-6).all()
            changes.append((change / before).abs().max())
    assert max(changes) > 0.25
    assert torch.equal(perturbed.conv1.weight, model.conv1.weight)
    assert torch.equal(perturbed.bn1.running_mean, model.bn1.running_mean)


def test_the_ascent_raises_the_loss(trained, toy_set) -> None:
    clean = toy_set(40)

    def loss(steps: int) -> float:
        perturbed = NeuronNoise(steps=steps, strength=0.3)._perturb(trained, clean, rng())
        return F.cross_entropy(perturbed(clean.as_floats()), clean.labels).item()

    assert loss(steps=1) > loss(steps=0) + 0.1


def test_a_model_without_neurons_is_refused() -> None:
    with pytest.raises(UserError, match="neither a normalization"):
        NeuronNoise().score(Planted(), images(), rng=rng())


@pytest.mark.parametrize(
    "field, value",
    [
        ("min_score", 50.0),
        ("min_margin", -0.1),
        ("strength", 0.0),
        ("copies", 0),
        ("steps", -1),
        ("batch_size", 0),
    ],
)
def test_out_of_range_fields_are_named(field: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{field}.*{value:g}"):
        NeuronNoise(**{field: value})
