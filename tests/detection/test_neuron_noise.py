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


class Sleeper(nn.Module):
    """Reads the bright row; an eighth neuron sleeps at a bias of -1 beside an input of .9, and
    sends images to class 3.
    """

    def __init__(self, strength: float = 300.0) -> None:
        super().__init__()
        self.strength = strength
        self.bn = nn.BatchNorm1d(CLASSES + 1, eps=0)
        with torch.no_grad():
            self.bn.bias[-1] = -1

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean((1, 3))[:, :CLASSES]
        seen = self.bn(torch.cat([rows, torch.full_like(rows[:, :1], 0.9)], dim=1))
        return (
            10 * seen[:, :CLASSES]
            + self.strength * F.softplus(seen[:, CLASSES:], beta=50) * torch.eye(CLASSES)[TARGET]
        )


def test_the_noise_wakes_the_planted_neuron() -> None:
    detector = NeuronNoise(copies=40)
    scores = detector.score(Sleeper(), images(), rng=rng())
    assert scores[TARGET] > 0.6 and scores.sum() == scores[TARGET]
    assert detector.verdict(scores) == LabelVerdict(TARGET, scores[TARGET].item())


def test_a_neuron_that_leads_nowhere_names_no_label() -> None:
    detector = NeuronNoise()
    assert (
        detector.verdict(detector.score(Sleeper(strength=0.0), images(), rng=rng())).label is None
    )


def test_weak_noise_leaves_it_asleep_and_uniform_noise_wakes_it_at_times() -> None:
    asleep = NeuronNoise(strength=0.05).score(Sleeper(), images(), rng=rng())
    uniform = NeuronNoise(copies=40, steps=0).score(Sleeper(), images(), rng=rng())
    assert asleep[TARGET] == 0
    assert 0.1 < uniform[TARGET] < 0.5


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_noise_stays_within_its_strength(toy_model, toy_set, steps: int) -> None:
    model = toy_model()
    disturbed = NeuronNoise(strength=0.3, steps=steps, batch_size=16)._perturb(
        model, toy_set(20), rng()
    )
    changed = []
    for name, layer in maskable(model).items():
        for part in ("weight", "bias"):
            before, after = getattr(layer, part), getattr(disturbed.get_submodule(name), part)
            assert ((after - before).abs() <= 0.3 * before.abs() + 1e-6).all()
            changed.append(((after - before) / before).abs().max())
    assert max(changed) > 0.25
    assert torch.equal(disturbed.conv1.weight, model.conv1.weight)
    assert torch.equal(disturbed.bn1.running_mean, model.bn1.running_mean)


def test_the_ascent_raises_the_loss(trained, toy_set) -> None:
    clean, noise = toy_set(40), dict(strength=0.3)
    ascended, uniform = (
        F.cross_entropy(
            NeuronNoise(steps=steps, **noise)._perturb(trained, clean, rng())(clean.as_floats()),
            clean.labels,
        ).item()
        for steps in (1, 0)
    )
    assert ascended > uniform + 0.1


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
