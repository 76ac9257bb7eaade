"""One place chooses the memory layout: images come in any, a network that cannot have channels last keeps plain ones."""

import pytest
import torch
from torch import nn

from rnp.models.build import Architecture
from rnp.models.classifier import Classifier, evaluating, risky, settle
from rnp.models.names import ARCHITECTURES
from rnp.training import Train, predict

ZERO, ONE = torch.zeros(3), torch.ones(3)


class Flattening(nn.Module):
    """Flattens 4 by 4 pixels with `view`, as most published networks for CIFAR do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Linear(64, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.fc(x.view(len(x), -1))


def narrow(channels=4, groups=1):
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 8, 1, 2, groups=groups), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(8, 4))


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
        model(data.floats())
    truth = model.net.to(memory_format=torch.contiguous_format).eval()(data.floats())
    assert settle(model, data.floats()[:1]) is model and lies_plain(model)
    assert model.plain_because.startswith("with channels last it fails: view size is not compatible")
    assert torch.equal(predict(model, data.images), truth)
    Train(epochs=1, batch_size=4)(model, data, rng=rng())
    assert lies_plain(model)


@pytest.mark.parametrize("net, reason", [(narrow(), "layer 1 is"), (narrow(15), "layer 1 is"), (narrow(16), ""), (narrow(4, groups=2), "")])
def test_a_network_with_a_risky_layer_stays_plain(net, reason, rng):
    model = settle(classifier(net), torch.rand(1, 3, 8, 8, generator=rng()))
    assert model.plain_because.startswith(reason) and bool(model.plain_because) == bool(reason) == lies_plain(model)


def test_a_network_that_runs_in_no_layout_is_left(rng):
    model = settle(classifier(Flattening()), torch.rand(1, 3, 20, 20, generator=rng()))
    assert not model.plain_because and not lies_plain(model)


def test_settling_changes_no_number(rng):
    model = classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten())).train()
    before, drawn = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    settle(model, torch.rand(2, 3, 8, 8, generator=rng()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules()) and torch.equal(torch.get_rng_state(), drawn)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_our_own_networks_are_safe(arch, rng):
    for width in (1, 4, 16):
        assert not risky(Architecture(arch=arch, width=width).build(4, 3, ZERO, ONE, rng=rng()))


def test_modes_come_back(toy_model):
    model = toy_model().train()
    model.bn1.eval()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not any(module.training for module in model.modules())
        1 / 0
    assert model.training and model.conv1.training and not model.bn1.training
