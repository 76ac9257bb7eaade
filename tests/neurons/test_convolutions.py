"""Which convolution feeds which BatchNorm."""

import pytest
import torch
from torch import nn

from rnp.errors import UserError
from rnp.models.build import Architecture
from rnp.neurons.convolutions import convolution_of_norm
from rnp.neurons.masks import maskable


def build(arch, rng, width=2):
    architecture = Architecture(arch=arch, width=width)
    return architecture.build(4, 3, torch.zeros(3), torch.ones(3), rng=rng())


@pytest.mark.parametrize("arch", ["resnet10", "resnet50", "mobilenet_v2", "vgg19_bn"])
def test_pairs_agree_with_the_names(arch, toy_set, rng, unchanged):
    """`bn2` belongs to `conv2`, the shortcut's second module to its first."""
    model = build(arch, rng).train()
    pairs = convolution_of_norm(unchanged(model), toy_set(1, size=32).images)
    assert list(pairs) == list(maskable(model)) and model.training
    for layer, convolution in pairs.items():
        name = layer.rpartition(".")[2]
        expected = str(int(name) - 1) if name.isdigit() else name.replace("bn", "conv")
        assert convolution.rpartition(".")[2] == expected
        assert convolution.rpartition(".")[0] == layer.rpartition(".")[0]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Crossed(nn.Module):
    """Built in another order than it runs.

    `how` is what happens between the first convolution and its BatchNorm.
    """

    def __init__(self, how):
        super().__init__()
        self.norm_b = nn.BatchNorm2d(3)
        self.norm_a = nn.BatchNorm2d(3)
        self.b = nn.Conv2d(3, 3, 1)
        self.a = nn.Conv2d(3, 3, 1)
        self.same = nn.Identity()
        self.how = how

    def forward(self, x):
        y = self.a(x)
        if self.how == "in place":
            y += x
        elif self.how == "sum":
            y = y + x
        return self.norm_b(self.b(self.norm_a(self.same(y)))).mean((2, 3))


def test_the_order_of_modules_does_not_matter(toy_set):
    assert convolution_of_norm(Crossed("nothing"), toy_set(1).images) == {
        "norm_b": "b",
        "norm_a": "a",
    }


@pytest.mark.parametrize("how", ["in place", "sum"])
def test_a_sum_has_no_kernel(how, toy_set):
    model = Crossed(how)
    with pytest.raises(
        UserError, match="layer norm_a does not normalize the output of a convolution"
    ):
        convolution_of_norm(model, toy_set(1).images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_pre_activation_networks_are_refused(toy_set, rng):
    model = build("preactresnet18", rng)
    with pytest.raises(
        UserError, match=r"layer net\.stages\.0\.1\.bn1 .* choose a defense that needs none"
    ):
        convolution_of_norm(model, toy_set(1, size=32).images)


class Several(nn.Module):
    """Two convolutions feed one normalization, or one feeds two, by `how`."""

    def __init__(self, how):
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1)
        self.b = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.other = self.norm if how == "under two names" else nn.BatchNorm2d(3)
        self.how = how

    def forward(self, x):
        y = self.norm(self.a(x))
        if self.how == "one convolution":
            y = self.other(self.a(y))
        elif self.how == "a sum too":
            y = self.other(self.b(self.norm(y + x)))
        elif self.how == "under two names":
            y = self.other(self.b(y))
        elif self.how == "twice":
            y = self.other(self.b(self.norm(self.b(y))))
        return y.mean((2, 3))


@pytest.mark.parametrize(
    "how, words",
    [
        ("twice", r"layer norm normalizes the outputs of several convolutions \(a, b\)"),
        ("under two names", r"layer norm normalizes the outputs of several convolutions \(a, b\)"),
        ("a sum too", "layer norm does not normalize the output of a convolution"),
        ("never", "layer other takes no part in the forward pass"),
    ],
)
def test_an_ambiguous_pairing_is_refused(how, words, toy_set):
    with pytest.raises(UserError, match=words):
        convolution_of_norm(Several(how), toy_set(1).images)


def test_one_convolution_may_feed_two_normalizations(toy_set):
    model = Several("one convolution")
    pairs = convolution_of_norm(model, toy_set(1).images)
    assert pairs == {"norm": "a", "other": "a"} and list(pairs) == list(maskable(model))


@pytest.mark.parametrize("arch", ["vit", "convnext"])
def test_layer_norms_have_no_kernel(arch, toy_set, rng):
    model = build(arch, rng, width=4)
    with pytest.raises(UserError, match="choose a defense that needs none"):
        convolution_of_norm(model, toy_set(1, size=32).images)


def test_without_norms_convolutions_feed_themselves(toy_set, rng):
    pairs = convolution_of_norm(build("vgg11", rng, width=4), toy_set(1, size=32).images)
    assert pairs and all(name == convolution for name, convolution in pairs.items())
