"""Implicit adversarial unlearning: the perturbation, the gradient through it, and the effect of
the rounds.
"""

import pytest
import torch
import torch.nn.functional as F
from planted import CLASSES, CORNER, TARGET, images, triggered
from torch import nn

from rnp.defenses.i_bau import IBAU
from rnp.errors import UserError
from rnp.training.predict import accuracy, predict
from rnp.types import DefenseSet, ImageSet


class Corner(nn.Module):
    """Reads the brightest row; a brighter corner raises the logit of one class."""

    def __init__(self) -> None:
        super().__init__()
        self.corner = nn.Parameter(torch.tensor(40.0))

    def forward(self, x):
        backdoor = self.corner * x[:, :, CORNER].mean((1, 2))  # [n]
        return 10 * x.mean((1, 3))[:, :CLASSES] + backdoor.unsqueeze(1) * torch.eye(CLASSES)[TARGET]


@pytest.fixture
def linear(rng):
    """One channel of 2x2 pixels, three classes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=rng(1)))
    return model


def test_the_gradient_is_that_of_an_unrolled_ascent(linear, rng):
    """A large penalty makes the maximum unique; the implicit term then adds the derivative of the
    point at which the ascent ends.
    """
    method = IBAU(penalty=1.0, inner_step_size=0.2, iterations=60)
    images, labels = torch.rand(6, 1, 2, 2, generator=rng(2)), torch.tensor([0, 1, 2, 0, 0, 1])

    def cost(noise):
        return F.cross_entropy(linear(images + noise), labels).square()

    noise = torch.zeros(1, 1, 2, 2, requires_grad=True)
    for _ in range(60):
        inner_loss = method.inner_loss(linear, images, labels, noise)
        (uphill,) = torch.autograd.grad(inner_loss, noise, create_graph=True)
        noise = noise + 0.2 * uphill
    weights = list(linear.parameters())
    expected = torch.autograd.grad(cost(noise), weights)

    end = noise.detach().requires_grad_()
    loss = cost(end)
    total = loss + method.implicit_term(linear, images, labels, end, loss)
    gradients = torch.autograd.grad(total, weights, retain_graph=True)
    without_term = torch.autograd.grad(loss, weights)
    assert total.item() == loss.item(), "the value is that of the loss"
    for value, wanted, plain in zip(gradients, expected, without_term):
        torch.testing.assert_close(value, wanted, atol=1e-5, rtol=1e-3)
        assert not torch.allclose(plain, wanted, atol=1e-3), "the case would prove nothing"


def test_few_iterations_are_the_first_terms_of_the_series(linear, rng):
    images, labels = torch.rand(3, 1, 2, 2, generator=rng(2)), torch.tensor([0, 1, 2])
    method = IBAU(penalty=0.5, inner_step_size=0.3, iterations=2)
    noise = torch.randn(1, 1, 2, 2, generator=rng(3)).requires_grad_()
    loss = F.cross_entropy(linear(images + noise), labels)

    def step(flat):
        point = flat.view(1, 1, 2, 2)
        inner_loss = method.inner_loss(linear, images, labels, point)
        (uphill,) = torch.autograd.grad(inner_loss, point, create_graph=True)
        return (point + 0.3 * uphill).flatten()

    jacobian = torch.autograd.functional.jacobian(step, noise.detach().flatten())  # [4, 4]
    direct = torch.autograd.grad(loss, noise, retain_graph=True)[0].flatten()
    adjoint = direct + direct @ jacobian + direct @ jacobian @ jacobian
    end = step(noise.detach().requires_grad_().flatten())
    (expected,) = torch.autograd.grad(end @ adjoint, linear[1].weight)
    term = method.implicit_term(linear, images, labels, noise, loss)
    (gradient,) = torch.autograd.grad(term, linear[1].weight)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_the_perturbation_follows_the_weights_to_the_radius(linear, rng):
    """Two classes, all images of class 0: the steepest direction is from the weights of class 0 to
    those of class 1.
    """
    linear[1] = nn.Linear(4, 2)
    clean = ImageSet(
        torch.full((8, 1, 2, 2), 100, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.int64),
        ("a", "b"),
    )
    noise = IBAU(radius=3.0).inner_maximum(linear, clean, rng=rng())
    direction = (linear[1].weight[1] - linear[1].weight[0]).detach()
    assert noise.shape == (1, 1, 2, 2)
    assert noise.norm().item() == pytest.approx(3.0)
    assert F.cosine_similarity(noise.flatten(), direction, dim=0).item() > 0.999


def test_the_penalty_alone_can_hold_it(linear, rng):
    """On a plateau of the loss there is no gradient: the perturbation stays 0."""
    with torch.no_grad():
        linear[1].weight.zero_()
    clean = ImageSet(
        torch.full((8, 1, 2, 2), 100, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.int64),
        ("a", "b", "c"),
    )
    assert IBAU().inner_maximum(linear, clean, rng=rng()).abs().max().item() < 1e-6


def test_the_planted_backdoor_is_unlearned(rng):
    """A bright corner sends every image to one class, and no trigger is shown to the defense."""
    model, test = Corner(), images(60, seed=2)
    method = IBAU(radius=3.0, rounds=20, lr=1.0, perturbed_fraction=0.5, batch_size=20)
    repaired = method.repair(model, DefenseSet(images(60), images(12, seed=1)), rng=rng()).model

    def success(network):
        reached = predict(network, triggered(test)).argmax(1) == TARGET
        return reached[test.labels != TARGET].float().mean().item()

    assert success(model) == 1
    assert success(repaired) < 0.1
    assert accuracy(repaired, test) == 1


def test_every_batch_has_a_carrier(trained, toy_set, rng, monkeypatch):
    """1 % of ten images is none; the loss would not see the perturbation at all."""
    norms = []

    def implicit_term(self, model, images, labels, noise, loss):
        norms.append(torch.autograd.grad(loss, noise, retain_graph=True)[0].norm().item())
        return torch.zeros(())

    monkeypatch.setattr(IBAU, "implicit_term", implicit_term)
    IBAU(radius=0.5, perturbed_fraction=0.01, rounds=2, batch_size=10).repair(
        trained, DefenseSet(toy_set(40), toy_set(4)), rng=rng()
    )
    assert len(norms) == 8
    assert min(norms) > 0


def test_batchnorm_keeps_its_statistics_and_the_history_counts(trained, toy_set, rng):
    rows = []
    sets = DefenseSet(toy_set(40), toy_set(4))
    repaired = IBAU(rounds=3, batch_size=10).repair(trained, sets, rng=rng(), on_epoch=rows.append)
    for name, value in trained.named_buffers():
        assert torch.equal(repaired.model.get_buffer(name), value)
    assert not torch.equal(repaired.model.conv1.weight, trained.conv1.weight)
    assert [(row.epoch, row.step) for row in rows] == [(0, 4), (1, 8), (2, 12)]


POSITIVE = (
    "radius",
    "inner_steps",
    "ascent_lr",
    "inner_step_size",
    "implicit_batch",
    "rounds",
    "lr",
    "batch_size",
)


@pytest.mark.parametrize(
    "name, value, bounds",
    [
        *((name, 0, "above 0") for name in POSITIVE),
        ("penalty", -1, "0 or more"),
        ("iterations", -1, "0 or more"),
        ("perturbed_fraction", 0, r"in \(0, 1\]"),
        ("perturbed_fraction", 2, r"in \(0, 1\]"),
    ],
)
def test_impossible_settings_are_refused(name, value, bounds):
    with pytest.raises(UserError, match=rf"i_bau\.{name} must be {bounds}, got {value}"):
        IBAU(**{name: value})
