"""Cached passes give the logits of whole forward passes, and run less of the network."""

import jaxtyping
import pytest
import torch
from torch import nn

from rnp.models.build import Architecture
from rnp.models.names import ARCHITECTURES
from rnp.neurons.activation_cache import ActivationCache
from rnp.neurons.masks import maskable, zero_channel
from rnp.training.predict import predict

# The two of torchvision have SiLU in place, and many live tensors.
SMALL = [*ARCHITECTURES, "torchvision:mobilenet_v3_small", "torchvision:densenet121"]


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Disable the checks of shapes: PyTorch traces with proxies, which are no tensors."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def build(arch, rng):
    mean = torch.full((3,), 0.5)
    width = 4 if arch in ARCHITECTURES else 0
    return Architecture(arch=arch, width=width).build(4, 3, mean, mean, rng=rng()).eval()


@pytest.mark.parametrize("arch", SMALL)
def test_it_agrees_with_a_whole_pass(arch, rng, toy_set):
    model = build(arch, rng)
    images = toy_set(6, size=32).images
    layers = list(maskable(model))
    generator = rng(1)
    cache = ActivationCache(model, images, "fp32")
    assert torch.equal(cache.logits(), predict(model, images))
    assert cache.cached_nodes, "nowhere to start from"
    cache.commit()
    for step in range(8):
        name = layers[int(torch.randint(len(layers), (), generator=generator))]
        before = model.get_submodule(name).weight.detach().clone()
        zero_channel(model, (name, 0))
        assert torch.allclose(cache.logits(name), predict(model, images), atol=1e-6)
        if step % 2:
            cache.commit()
        else:
            model.get_submodule(name).weight.data.copy_(before)


@pytest.fixture
def counted(rng):
    """A small ResNet and the names of the convolutions that have run."""
    model = build("resnet10", rng)
    ran = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return model, ran


def test_only_what_follows_a_change_runs_again(counted, toy_set):
    model, ran = counted
    cache = ActivationCache(model, toy_set(4, size=32).images, "fp32")
    cache.logits()
    cache.commit()
    ran.clear()
    cache.logits("net.stages.3.0.bn2")
    assert set(ran) < {name for name, _ in model.named_modules() if name.startswith("net.stages.3")}
    ran.clear()
    cache.logits("net.stages.2.0.bn1")
    cache.commit()
    assert "net.stages.3.0.conv1" in ran
    assert not any(name.startswith("net.stages.1") for name in ran)


def test_without_memory_everything_runs(counted, toy_set, monkeypatch):
    monkeypatch.setattr("rnp.neurons.activation_cache.BUDGET", 0)
    model, ran = counted
    cache = ActivationCache(model, toy_set(4, size=32).images, "fp32")
    cache.logits()
    cache.commit()
    ran.clear()
    cache.logits("net.stages.3.0.bn2")
    assert "net.conv1" in ran


class Branching(nn.Module):
    """PyTorch cannot trace it: its control flow depends on values."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 4)

    def forward(self, x):
        x = self.norm(x).mean((2, 3))
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


def test_what_cannot_be_traced_runs_as_a_whole(toy_set):
    model, images = Branching().eval(), toy_set(4).images
    cache = ActivationCache(model, images, "fp32")
    first = cache.logits()
    cache.commit()
    zero_channel(model, ("norm", 1))
    assert torch.equal(cache.logits("norm"), predict(model, images))
    assert not torch.equal(first, predict(model, images))


class Again(nn.Module):
    """Runs one normalization three times: by its own name, by another, and by its weights alone."""

    def __init__(self, weights_first):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.norm = self.alias = nn.GroupNorm(2, 4)
        self.later = nn.GroupNorm(1, 4)
        self.weights_first = weights_first

    def forward(self, x):
        x = self.conv(x)
        if self.weights_first:
            x = nn.functional.group_norm(x, 2, self.norm.weight, self.norm.bias)
        else:
            x = self.norm(x)
        x = self.conv2(self.alias(self.conv2(x)))
        return self.later(x).mean((2, 3))


@pytest.mark.parametrize("weights_first", [True, False])
def test_a_layer_that_runs_twice(weights_first, toy_set):
    """Activations behind its first run are stale when it changes, however it got the weights."""
    torch.manual_seed(0)
    model = Again(weights_first).eval()
    images = toy_set(4).images
    cache = ActivationCache(model, images, "fp32")
    cache.logits()
    cache.commit()
    assert cache.graph is not None and cache.cached_nodes
    zero_channel(model, ("norm", 1))
    assert torch.allclose(cache.logits("norm"), predict(model, images), atol=1e-6)


class Counting(nn.Module):
    """A trace of it records one pass, and the next one computes something else."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.passes = 0

    def forward(self, x):
        self.passes += 1
        return self.norm(x).mean((2, 3)) * (1 + self.passes % 3)


def test_a_trace_that_computes_something_else_is_not_used(toy_set):
    assert ActivationCache(Counting().eval(), toy_set(4).images, "fp32").graph is None
