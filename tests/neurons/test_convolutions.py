"""Which convolution feeds which BatchNorm."""

import pytest
import torch
from torch import nn

from rnp.errors import UserError
from rnp.models.build import Architecture
from rnp.neurons.convolutions import convolution_of_norm
from rnp.neurons.masks import maskable


@pytest.mark.parametrize("arch", ["resnet10", "resnet50", "mobilenet_v2", "vgg19_bn"])
def test_the_names_say_who_feeds_whom(arch, toy_set, rng, unchanged):
    """`bn2` belongs to `conv2`, the shortcut's second module to its first."""
    model = (
        Architecture(arch=arch, width=2)
        .build(4, 3, torch.zeros(3), torch.ones(3), rng=rng())
        .train()
    )
    found = convolution_of_norm(unchanged(model), toy_set(1, size=32).images)
    assert list(found) == list(maskable(model)) and model.training
    for layer, convolution in found.items():
        name = layer.rpartition(".")[2]
        expected = str(int(name) - 1) if name.isdigit() else name.replace("bn", "conv")
        assert (
            convolution.rpartition(".")[2] == expected
            and convolution.rpartition(".")[0] == layer.rpartition(".")[0]
        )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Crossed(nn.Module):
    """Built in another order than it runs; `how` is what happens between the first convolution and
    its BatchNorm.
    """

    def __init__(self, how):
        super().__init__()
        self.norm_b, self.norm_a = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.b, self.a = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.how, self.same = how, nn.Identity()

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
    model = Architecture(arch="preactresnet18", width=2).build(
        4, 3, torch.zeros(3), torch.ones(3), rng=rng()
    )
    with pytest.raises(
        UserError, match=r"layer net\.stages\.0\.1\.bn1 .* choose a defense that needs none"
    ):
        convolution_of_norm(model, toy_set(1, size=32).images)


class Several(nn.Module):
    """`how` one normalization is fed by two convolutions, or one convolution feeds two
    normalizations.
    """

    def __init__(self, how):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.other = self.norm if how == "under two names" else nn.BatchNorm2d(3)
        self.how = how

    def forward(self, x):
        if self.how == "one convolution":
            x = self.other(self.a(self.norm(self.a(x))))
        elif self.how == "a sum too":
            x = self.other(self.b(self.norm(self.norm(self.a(x)) + x)))
        elif self.how == "never":
            x = self.norm(self.a(x))
        else:
            x = self.norm(self.a(x))
            x = (
                self.other(self.b(x))
                if self.how == "under two names"
                else self.other(self.b(self.norm(self.b(x))))
            )
        return x.mean((2, 3))


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
    assert (
        convolution_of_norm(Several("one convolution"), toy_set(1).images)
        == {"norm": "a", "other": "a"}
        == {name: "a" for name in maskable(Several("one convolution"))}
    )


@pytest.mark.parametrize("arch", ["vit", "convnext"])
def test_layer_norms_have_no_kernel(arch, toy_set, rng):
    model = Architecture(arch=arch, width=4).build(4, 3, torch.zeros(3), torch.ones(3), rng=rng())
    with pytest.raises(UserError, match="choose a defense that needs none"):
        convolution_of_norm(model, toy_set(1, size=32).images)


def test_without_norms_convolutions_feed_themselves(toy_set, rng):
    model = Architecture(arch="vgg11", width=4).build(
        4, 3, torch.zeros(3), torch.ones(3), rng=rng()
    )
    assert all(
        name == convolution
        for name, convolution in convolution_of_norm(model, toy_set(1, size=32).images).items()
    )
