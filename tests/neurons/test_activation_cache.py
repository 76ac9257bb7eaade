"""A replay gives what a whole forward pass gives, and runs less of the network."""

import jaxtyping
import pytest
import torch
from torch import nn

from rnp.models.build import Architecture
from rnp.models.names import ARCHITECTURES
from rnp.neurons.activation_cache import ActivationCache
from rnp.neurons.masks import zero_channel, maskable
from rnp.training.predict import predict

SMALL = [
    *ARCHITECTURES,
    "torchvision:mobilenet_v3_small",
    "torchvision:densenet121",
]  # SiLU in place; many live tensors


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """PyTorch traces with stand-ins for tensors, which the checks of the test suite would
    refuse.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def build(arch, rng):
    mean = torch.full((3,), 0.5)
    width = 4 if arch in ARCHITECTURES else 0
    return Architecture(arch=arch, width=width).build(4, 3, mean, mean, rng=rng()).eval()


@pytest.mark.parametrize("arch", SMALL)
def test_it_agrees_with_a_whole_pass(arch, rng, toy_set):
    model, images = build(arch, rng), toy_set(6, size=32).images
    layers, generator = list(maskable(model)), rng(1)
    replay = ActivationCache(model, images, "fp32")
    assert torch.equal(replay.logits(), predict(model, images))
    assert replay.cuts, "nowhere to start from"
    replay.commit()
    for step in range(8):
        name = layers[int(torch.randint(len(layers), (), generator=generator))]
        before = model.get_submodule(name).weight.detach().clone()
        zero_channel(model, (name, 0))
        assert torch.allclose(replay.logits(name), predict(model, images), atol=1e-6)
        if step % 2:
            replay.commit()
        else:
            model.get_submodule(name).weight.data.copy_(before)


@pytest.fixture
def counted(rng):
    """A small ResNet and the names of the convolutions that have run."""
    model, ran = build("resnet10", rng), []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return model, ran


def test_only_what_follows_a_change_runs_again(counted, toy_set):
    model, ran = counted
    replay = ActivationCache(model, toy_set(4, size=32).images, "fp32")
    replay.logits()
    replay.commit()
    ran.clear()
    replay.logits("net.stages.3.0.bn2")
    assert set(ran) < {name for name, _ in model.named_modules() if name.startswith("net.stages.3")}
    ran.clear()
    replay.logits("net.stages.2.0.bn1")
    replay.commit()
    assert "net.stages.3.0.conv1" in ran and not any(
        name.startswith("net.stages.1") for name in ran
    )


def test_without_room_everything_runs(counted, toy_set, monkeypatch):
    monkeypatch.setattr("rnp.neurons.activation_cache.BUDGET", 0)
    model, ran = counted
    replay = ActivationCache(model, toy_set(4, size=32).images, "fp32")
    replay.logits()
    replay.commit()
    ran.clear()
    replay.logits("net.stages.3.0.bn2")
    assert "net.conv1" in ran


class Branching(nn.Module):
    """What PyTorch cannot trace: its way depends on the values."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.BatchNorm2d(3), nn.Linear(3, 4)

    def forward(self, x):
        x = self.norm(x).mean((2, 3))
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def test_what_cannot_be_traced_runs_as_a_whole(toy_set):
    model, images = Branching().eval(), toy_set(4).images
    replay = ActivationCache(model, images, "fp32")
    first = replay.logits()
    replay.commit()
    zero_channel(model, ("norm", 1))
    assert torch.equal(replay.logits("norm"), predict(model, images)) and not torch.equal(
        first, predict(model, images)
    )


class Again(nn.Module):
    """Runs one normalization three times: by its own name, by another, and by its weights alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)
        self.alias, self.later = self.norm, nn.GroupNorm(1, 4)

    def forward(self, x):
        x = self.conv(x)
        x = (
            nn.functional.group_norm(x, 2, self.norm.weight, self.norm.bias)
            if self.weights_first
            else self.norm(x)
        )
        x = self.conv2(self.alias(self.conv2(x)))
        return self.later(x).mean((2, 3))


@pytest.mark.parametrize("weights_first", [True, False])
def test_a_layer_that_runs_twice(weights_first, toy_set):
    """What was kept behind its first run is stale when it changes, whichever way the first run
    reads its weights.
    """
    torch.manual_seed(0)
    model, images = Again().eval(), toy_set(4).images
    model.weights_first, model.conv2 = weights_first, nn.Conv2d(4, 4, 1)
    replay = ActivationCache(model, images, "fp32")
    replay.logits()
    replay.commit()
    assert replay.graph is not None and replay.cuts
    zero_channel(model, ("norm", 1))
    assert torch.allclose(replay.logits("norm"), predict(model, images), atol=1e-6)


class Counting(nn.Module):
    """A trace of it holds what one pass did, which is not what the next one does."""

    def __init__(self):
        super().__init__()
        self.norm, self.passes = nn.BatchNorm2d(3), 0

    def forward(self, x):
        self.passes += 1
        return self.norm(x).mean((2, 3)) * (1 + self.passes % 3)


def test_a_trace_that_says_something_else_is_not_used(toy_set):
    assert ActivationCache(Counting().eval(), toy_set(4).images, "fp32").graph is None
