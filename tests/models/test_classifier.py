"""One place chooses the memory layout: images come in any, a network that cannot have channels
last keeps plain ones.
"""

import pytest
import torch
from torch import nn

from rnp.errors import UserError
from rnp.models.build import REGISTERED, Architecture
from rnp.models.classifier import Classifier, evaluating, risky, settle
from rnp.models.names import ARCHITECTURES
from rnp.training.predict import predict
from rnp.training.recipe import Train

ZERO, ONE = torch.zeros(3), torch.ones(3)


class Flattening(nn.Module):
    """Flattens 4 by 4 pixels with `view`, as most published networks for CIFAR do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = (
            nn.Conv2d(3, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.Linear(64, 4),
        )

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(x.view(len(x), -1))


def narrow(channels=4, groups=1):
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


def lies_plain(model):
    return all(p.is_contiguous() for p in model.parameters())


def test_images_come_in_any_layout(rng):
    model, images = classifier(narrow()), torch.rand(4, 3, 8, 8, generator=rng())
    assert torch.equal(model(images), model(images.contiguous(memory_format=torch.channels_last)))


def test_a_network_that_flattens_by_view_stays_plain(toy_set, rng):
    data = toy_set(8)
    model = classifier(Flattening())
    with pytest.raises(RuntimeError, match="view size"):
        model(data.as_floats())
    truth = model.net.to(memory_format=torch.contiguous_format).eval()(data.as_floats())
    assert settle(model, data.as_floats()[:2]) is model and lies_plain(model)
    assert model.plain_because.startswith(
        "it fails with channels last, RuntimeError: view size is not compatible"
    )
    assert torch.equal(predict(model, data.images), truth)
    Train(epochs=1, batch_size=4)(model, data, rng=rng())
    assert lies_plain(model)


class Mixing(nn.Module):
    """Normalizes images and channels together with a `view` that fails from two images on."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x)
        n, c, h, w = x.shape
        return self.fc(x.view(n * c, h * w).mean(1).view(n, c))


def test_two_images_tell_what_one_does_not(rng):
    images = torch.rand(2, 3, 8, 8, generator=rng())
    assert (
        not settle(classifier(Mixing()), images[:1]).plain_because
        and settle(classifier(Mixing()), images).plain_because
    )


@pytest.mark.parametrize(
    "net, reason",
    [
        (narrow(), "layer 1 is"),
        (narrow(15), "layer 1 is"),
        (narrow(16), ""),
        (narrow(4, groups=2), ""),
    ],
)
def test_a_network_with_a_risky_layer_is_plain_from_the_start(net, reason):
    model = classifier(net)
    assert model.plain_because.startswith(reason) and bool(model.plain_because) == bool(
        reason
    ) == lies_plain(model)


class Functional(nn.Module):
    """A strided 1x1 convolution that is no layer; `ahead` gives it channels last, as ConvNeXt's
    norms do.
    """

    def __init__(self, ahead):
        super().__init__()
        self.conv, self.weight, self.fc = (
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Parameter(torch.randn(8, 4, 1, 1)),
            nn.Linear(8, 4),
        )
        self.ahead = ahead

    def forward(self, x):
        x = self.conv(x)
        x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if self.ahead else x
        return self.fc(nn.functional.conv2d(x, self.weight, stride=2).mean((2, 3)))


def test_an_unsafe_convolution_is_seen_when_it_runs(rng):
    images = torch.rand(2, 3, 8, 8, generator=rng())
    model = settle(classifier(Functional(ahead=False)), images)
    assert model.plain_because.startswith("it runs a 1x1 convolution") and lies_plain(model)
    with pytest.raises(
        UserError,
        match=r"Functional cannot be used with images of 3 x 8 x 8 .*: it runs a 1x1 convolution",
    ):
        settle(classifier(Functional(ahead=True)), images)


def test_a_network_that_runs_in_no_layout_is_refused(rng):
    with pytest.raises(
        UserError,
        match=(
            r"Flattening cannot be used with images of 3 x 20 x 20 .*in plain layout.*mat1 and mat2"
        ),
    ):
        settle(classifier(Flattening()), torch.rand(2, 3, 20, 20, generator=rng()))


def test_no_memory_is_no_question_of_layout(rng):
    class Greedy(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        settle(classifier(Greedy()), torch.rand(2, 3, 8, 8, generator=rng()))


def test_a_network_is_built_for_images(toy_set, rng, monkeypatch):
    monkeypatch.setitem(REGISTERED, "here:flattening", lambda: Flattening())
    assert lies_plain(Architecture(arch="here:flattening").build_for(toy_set(8), rng=rng()))
    with pytest.raises(UserError, match="VGG cannot be used with images of 3 x 8 x 8"):
        Architecture(arch="vgg11", width=2).build_for(toy_set(8), rng=rng())


def test_settling_changes_no_number(rng):
    model = classifier(
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Dropout(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    ).train()
    before, drawn = (
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
    )
    settle(model, torch.rand(2, 3, 8, 8, generator=rng()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and torch.equal(
        torch.get_rng_state(), drawn
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_our_own_networks_are_safe(arch, rng):
    for width in (1, 4, 16):
        assert not risky(Architecture(arch=arch, width=width).build(4, 3, ZERO, ONE, rng=rng()).net)


def test_modes_come_back(toy_model):
    model = toy_model().train()
    model.bn1.eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise ZeroDivisionError
    assert model.training and model.conv1.training and not model.bn1.training
