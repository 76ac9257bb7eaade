"""`Classifier` alone chooses the memory layout: channels last, or contiguous for a reason."""

import pytest
import torch
from torch import nn

from rnp.errors import UserError
from rnp.models.build import REGISTERED, Architecture
from rnp.models.classifier import (
    Classifier,
    are_probabilities,
    choose_layout,
    evaluating,
    find_unsafe_layer,
)
from rnp.models.names import ARCHITECTURES
from rnp.training.predict import predict
from rnp.training.recipe import Train

ZERO = torch.zeros(3)
ONE = torch.ones(3)


class Flattening(nn.Module):
    """Flattens 4 by 4 pixels with `view`, as most published networks for CIFAR do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.fc = nn.Linear(64, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(x.view(len(x), -1))


def narrow(channels=4, groups=1):
    """A network with a strided 1x1 convolution, unsafe for few channels in one group."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.Conv2d(channels, 8, 1, 2, groups=groups),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def classifier(net):
    torch.manual_seed(0)
    return Classifier(net, ZERO, ONE)


def is_contiguous(model):
    return all(p.is_contiguous() for p in model.parameters())


def test_images_can_have_any_layout(rng):
    model = classifier(narrow())
    images = torch.rand(4, 3, 8, 8, generator=rng())
    assert torch.equal(model(images), model(images.contiguous(memory_format=torch.channels_last)))


def test_a_network_that_flattens_by_view_becomes_contiguous(toy_set, rng):
    data = toy_set(8)
    model = classifier(Flattening())
    with pytest.raises(RuntimeError, match="view size"):
        model(data.as_floats())
    expected = model.net.to(memory_format=torch.contiguous_format).eval()(data.as_floats())
    assert choose_layout(model, data.as_floats()[:2]) is model
    assert is_contiguous(model)
    reason = "it fails with channels last, RuntimeError: view size is not compatible"
    assert model.contiguous_reason.startswith(reason)
    assert torch.equal(predict(model, data.images), expected)
    Train(epochs=1, batch_size=4)(model, data, rng=rng())
    assert is_contiguous(model)


class Mixing(nn.Module):
    """Normalizes images and channels together with a `view` that fails from two images on."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.shape
        return self.fc(x.view(n * c, h * w).mean(1).view(n, c))


def test_two_images_show_a_failure_that_one_does_not(rng):
    images = torch.rand(2, 3, 8, 8, generator=rng())
    assert not choose_layout(classifier(Mixing()), images[:1]).contiguous_reason
    assert choose_layout(classifier(Mixing()), images).contiguous_reason


@pytest.mark.parametrize(
    "net, reason",
    [
        (narrow(), "layer 1 is"),
        (narrow(15), "layer 1 is"),
        (narrow(16), ""),
        (narrow(4, groups=2), ""),
    ],
)
def test_a_network_with_an_unsafe_layer_is_contiguous_from_the_start(net, reason):
    model = classifier(net)
    assert model.contiguous_reason.startswith(reason)
    assert bool(model.contiguous_reason) == bool(reason) == is_contiguous(model)


class Functional(nn.Module):
    """A strided 1x1 convolution that is no layer, optionally on inputs with channels last."""

    def __init__(self, channels_last):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(8, 4, 1, 1))
        self.fc = nn.Linear(8, 4)
        self.channels_last = channels_last

    def forward(self, x):
        x = self.conv(x)
        if self.channels_last:  # as after a norm of ConvNeXt
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.fc(nn.functional.conv2d(x, self.weight, stride=2).mean((2, 3)))


def test_an_unsafe_convolution_is_detected_when_it_runs(rng):
    images = torch.rand(2, 3, 8, 8, generator=rng())
    model = choose_layout(classifier(Functional(channels_last=False)), images)
    assert model.contiguous_reason.startswith("it runs a 1x1 convolution")
    assert is_contiguous(model)
    message = r"Functional cannot be used with images of 3 x 8 x 8 .*: it runs a 1x1 convolution"
    with pytest.raises(UserError, match=message):
        choose_layout(classifier(Functional(channels_last=True)), images)


def test_a_network_that_runs_in_no_layout_is_refused(rng):
    images = torch.rand(2, 3, 20, 20, generator=rng())
    message = r"Flattening cannot be used with images of 3 x 20 x 20 .*when contiguous.*mat1"
    with pytest.raises(UserError, match=message):
        choose_layout(classifier(Flattening()), images)


def test_a_lack_of_memory_is_no_failure_of_the_layout(rng):
    class Greedy(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("not enough memory")

    with pytest.raises(torch.OutOfMemoryError):
        choose_layout(classifier(Greedy()), torch.rand(2, 3, 8, 8, generator=rng()))


def test_a_network_is_built_for_images(toy_set, rng, monkeypatch):
    monkeypatch.setitem(REGISTERED, "here:flattening", Flattening)
    assert is_contiguous(Architecture(arch="here:flattening").build_for(toy_set(8), rng=rng()))
    with pytest.raises(UserError, match="VGG cannot be used with images of 3 x 8 x 8"):
        Architecture(arch="vgg11", width=2).build_for(toy_set(8), rng=rng())


def test_choosing_a_layout_changes_no_number(rng, unchanged):
    body = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()
    model = classifier(nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten())).train()
    state = torch.get_rng_state()
    choose_layout(unchanged(model), torch.rand(2, 3, 8, 8, generator=rng()))
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_our_own_networks_are_safe(arch, rng):
    for width in (1, 4, 16):
        model = Architecture(arch=arch, width=width).build(4, 3, ZERO, ONE, rng=rng())
        assert not find_unsafe_layer(model.net)


def test_every_module_gets_its_mode_back(toy_model):
    model = toy_model().train()
    model.bn1.eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert model.training
    assert model.conv1.training
    assert not model.bn1.training


def test_probabilities_are_recognized(rng):
    logits = torch.randn(5, 3, generator=rng())
    assert are_probabilities(logits.softmax(1))
    assert not are_probabilities(logits)
    assert not are_probabilities(logits.log_softmax(1))
    assert not are_probabilities(logits.softmax(1) * 2)
    assert not are_probabilities(torch.ones(5, 1))


def test_the_logarithms_of_probabilities_serve_as_logits(rng):
    """They are the logits but for a constant per image, and finite where a probability is 0."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4))
    images = torch.rand(6, 3, 2, 2, generator=rng())
    plain = Classifier(net, ZERO, ONE)
    model = Classifier(nn.Sequential(net, nn.Softmax(1)), ZERO, ONE)
    model.gives_probabilities = True
    assert torch.allclose(model(images), plain(images).log_softmax(1), atol=1e-5)
    certain = Classifier(nn.Sequential(net, nn.Threshold(100, 0)), ZERO, ONE)
    certain.gives_probabilities = True
    assert certain(images).isfinite().all()
