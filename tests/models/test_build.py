"""Every architecture is built from its own generator, normalizes first, and explains errors."""

import pytest
import torch
from torch import nn

from rnp.errors import UserError
from rnp.models.build import Architecture, statistics
from rnp.models.classifier import Classifier
from rnp.models.names import ARCHITECTURES
from rnp.models.vit import position_embedding
from rnp.neurons.masks import maskable
from rnp.types import ImageSet

MEAN = torch.full((3,), 0.5)
STD = torch.full((3,), 0.25)


def build(arch="resnet10", *, width=4, classes=5, channels=3, rng):
    return Architecture(arch=arch, width=width).build(
        classes, channels, MEAN[:channels], STD[:channels], rng=rng
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("channels", [3, 1])
def test_builds_and_classifies(arch, channels, rng):
    model = build(arch, channels=channels, rng=rng())
    logits = model(torch.rand(2, channels, 32, 32, generator=rng()))
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()
    assert maskable(model)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters()), "some weight is not used"


@pytest.mark.parametrize("arch", ["resnet18", "vgg19_bn", "torchvision:resnet18"])
def test_weights_come_from_the_generator_alone(arch, rng):
    before = torch.get_rng_state()
    seed_1, again, seed_2 = (build(arch, rng=rng(seed)).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
    assert all(torch.equal(seed_1[name], again[name]) for name in seed_1)
    kernel = next(name for name, value in seed_1.items() if value.dim() == 4 and value.shape[2] > 1)
    assert not torch.equal(seed_1[kernel], seed_2[kernel])


def test_normalization_comes_first():
    model = Classifier(nn.Identity(), torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.125]))
    pixels = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    assert model(pixels).flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "arch, first", [("resnet10", "stages.1.0.conv1"), ("wrn16_1", "stages.2.1.conv1")]
)
def test_he_initialization_by_fan_out(arch, first, rng):
    weight = build(arch, width=16, rng=rng()).net.get_submodule(first).weight
    assert weight.std().item() == pytest.approx((2 / (weight.shape[0] * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "arch, neurons", [("resnet18", 4800), ("wrn16_1", 16 * 4 + 16 + 32 * 3 + 32 + 64 * 3 + 64)]
)
def test_the_published_width_has_the_published_neurons(arch, neurons, rng):
    """4,800 masks for the CIFAR ResNet-18 is the number in the log of the published code."""
    layers = maskable(build(arch, width=0, classes=10, rng=rng())).values()
    assert sum(layer.num_features for layer in layers) == neurons


def test_any_torchvision_classifier(rng):
    model = build("torchvision:resnet18", rng=rng()).eval()
    assert model(torch.rand(2, 3, 32, 32, generator=rng())).shape == (2, 5)


@pytest.mark.parametrize(
    "options, answer",
    [
        ({"arch": "resnet81"}, "did you mean 'resnet18'?"),
        ({"arch": "zzz"}, "choose from resnet10"),
        ({"width": -1}, "model.width must be 0 or more, got -1"),
        ({"arch": "torchvision:resnet81"}, "no classifier 'resnet81'; did you mean 'resnet18'?"),
        ({"arch": "torchvision:resnet18", "channels": 1}, "3 channels"),
    ],
)
def test_what_cannot_be_built_is_explained(options, answer, rng):
    with pytest.raises(UserError) as caught:
        build(**options, rng=rng())
    assert answer in str(caught.value)


def test_statistics_by_hand():
    images = torch.zeros(2, 2, 2, 2, dtype=torch.uint8)
    images[0, 0] = 255
    mean, std = statistics(ImageSet(images, torch.zeros(2, dtype=torch.int64), ("a", "b")))
    assert mean.tolist() == [0.5, 0.0]
    # never 0, by which images would be divided
    assert std.tolist() == pytest.approx([(8 * 0.25 / 7) ** 0.5, 1e-3])


def test_statistics_are_those_of_the_floats(toy_set):
    data = toy_set(230)
    values = data.images[:210].double() / 255
    mean, std = statistics(data, 210)
    assert torch.equal(mean, values.mean((0, 2, 3)).float())
    assert torch.equal(std, values.std((0, 2, 3)).float())


def test_torchvision_networks_with_auxiliary_heads_return_logits(rng):
    model = build("torchvision:googlenet", width=0, rng=rng())
    assert model.train()(torch.rand(2, 3, 64, 64, generator=rng())).shape == (2, 5)


class TwoHeads(nn.Module):
    def forward(self, images):
        return images, images


def test_two_heads_are_refused():
    message = "TwoHeads returns a tuple of 2 parts, not one tensor of logits"
    with pytest.raises(UserError, match=message):
        Classifier(TwoHeads(), MEAN, STD)(torch.rand(1, 3, 4, 4))


def test_group_norms_replace_every_batch_norm(rng):
    modules = list(build("resnet18_gn", width=24, rng=rng()).modules())
    norms = [module for module in modules if isinstance(module, nn.GroupNorm)]
    assert len(norms) == 20
    assert not any(isinstance(module, nn.BatchNorm2d) for module in modules)
    assert all(norm.num_groups == min(32, norm.num_channels // 8) for norm in norms)


@pytest.mark.parametrize("arch, sides", [("vit", (16, 32, 40)), ("convnext", (16, 32, 40))])
def test_layered_networks_take_images_of_any_size(arch, sides, rng):
    model = build(arch, rng=rng()).eval()
    for side in sides:
        assert model(torch.rand(2, 3, side, side, generator=rng())).isfinite().all()


def test_the_position_embedding_differs_at_every_place():
    """Four waves for the row and four for the column, at angles of 1, .1, .01 and .001 a step."""
    embedding = position_embedding(torch.zeros(1, 16, 3, 5))[0]
    assert embedding.shape == (15, 16)
    assert len(embedding.unique(dim=0)) == 15
    row = torch.tensor([2 * 10.0**-i for i in range(4)])
    column = torch.tensor([4 * 10.0**-i for i in range(4)])
    last = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()])
    assert torch.allclose(embedding[-1], last, atol=1e-6)
