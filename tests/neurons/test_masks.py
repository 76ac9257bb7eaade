"""Masks multiply scales and nothing else; pruning makes a mask of zeros permanent."""

import copy

import pytest
import torch
from torch import nn

from rnp.errors import UserError
from rnp.models.build import Architecture
from rnp.neurons.masks import (
    batch_norms,
    bias,
    forward_masked,
    freeze_statistics,
    maskable,
    prune,
    rank_neurons,
    unit_mask,
)


@pytest.fixture
def images(toy_set):
    return toy_set(12).as_floats()


def build(arch, rng, width):
    architecture = Architecture(arch=arch, width=width)
    return architecture.build(4, 3, torch.zeros(3), torch.ones(3), rng=rng())


def random_mask(model, rng):
    mask = unit_mask(model)
    return {name: torch.rand(len(value), generator=rng()) for name, value in mask.items()}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("arch", ["toy", "resnet10", "preactresnet18", "mobilenet_v2"])
def test_a_unit_mask_changes_nothing(arch, train, toy_model, images, rng):
    plain = (toy_model() if arch == "toy" else build(arch, rng, width=2)).train(train)
    masked = copy.deepcopy(plain)
    assert torch.equal(forward_masked(masked, images, unit_mask(masked)), plain(images))
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in masked.named_buffers())
    passes = next(b for name, b in buffers.items() if name.endswith("num_batches_tracked"))
    assert passes == int(train)


@pytest.mark.parametrize("train", [False, True])
def test_a_mask_is_a_factor_on_the_scale(train, toy_model, images, rng):
    model = toy_model().train(train)
    mask = random_mask(model, rng)
    by_hand = copy.deepcopy(model)
    for name, value in mask.items():
        by_hand.get_submodule(name).weight.data *= value
    assert torch.equal(forward_masked(model, images, mask), by_hand(images))


def test_gradients_reach_the_mask_and_not_the_scale(toy_model, images):
    model = toy_model()
    mask = {name: value.requires_grad_() for name, value in unit_mask(model).items()}
    forward_masked(model, images, mask).square().sum().backward()
    assert all(value.grad.any() for value in mask.values()) and model.bn1.weight.grad is None


def test_masking_a_channel_is_pruning_it(toy_model, images):
    model = toy_model()
    mask = unit_mask(model)
    mask["bn2"][3] = 0
    assert torch.equal(forward_masked(model, images, mask), prune(model, [("bn2", 3)])(images))


@pytest.mark.parametrize("zero_bias", [False, True])
def test_prune_changes_the_named_channels_of_a_copy(zero_bias, toy_model, unchanged):
    model = unchanged(toy_model())
    pruned = prune(model, [("bn1", 0), ("bn2", 5)], zero_bias=zero_bias)
    expected = copy.deepcopy(model.state_dict())
    for parameter in ("weight", "bias") if zero_bias else ("weight",):
        expected[f"bn1.{parameter}"][0] = expected[f"bn2.{parameter}"][5] = 0
    assert all(torch.equal(value, expected[name]) for name, value in pruned.state_dict().items())


@pytest.mark.parametrize(
    "mask, order",
    [
        # One channel of each layer stays.
        ({"a": [0.9, 0.1], "b": [0.5, 0.2]}, [("a", 1), ("b", 1)]),
        # Ties: by layer order, then index.
        ({"a": [1, 1, 1], "b": [1, 1]}, [("a", 0), ("a", 1), ("b", 0)]),
        # The order of the layers is not alphabetical.
        ({"b": [1, 1], "a": [1, 1]}, [("b", 0), ("a", 0)]),
        # A layer of one channel.
        ({"a": [0.0], "b": [0.3, 0.2, 0.2]}, [("b", 1), ("b", 2)]),
    ],
)
def test_ranking(mask, order):
    tensors = {name: torch.tensor(values, dtype=torch.float) for name, values in mask.items()}
    assert rank_neurons(tensors) == order


def test_a_small_difference_keeps_its_order():
    values = torch.tensor([1.0, 1.0 - 2**-24, 0.5])
    assert rank_neurons({"a": values}) == [("a", 2), ("a", 1)]


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.BatchNorm2d(3, affine=False), nn.LayerNorm([2, 3, 3])]
)
def test_a_model_without_neurons_is_an_error(model):
    with pytest.raises(
        UserError, match="neither a normalization with a scale per channel nor a convolution"
    ):
        unit_mask(nn.Sequential(model))


def test_maskable_finds_every_batchnorm(toy_model):
    assert list(maskable(toy_model())) == ["bn1", "bn2"]


def family(name: str) -> nn.Module:
    """A small network of another family; the layers of its neurons are listed in FAMILIES."""
    from torchvision.models import VisionTransformer
    from torchvision.models.convnext import CNBlock, LayerNorm2d

    end = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "vit":
            return VisionTransformer(
                image_size=8,
                patch_size=4,
                num_layers=2,
                num_heads=2,
                hidden_dim=8,
                mlp_dim=16,
                num_classes=4,
            )
        layers = {
            "groupnorm": [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU()],
            "convnext": [nn.Conv2d(3, 4, 2, 2), LayerNorm2d(4), CNBlock(4, 1.0, 0.0)],
            "no norm": [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU()],
            "norm first": [nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)],
            "instance norm": [nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU()],
            "rms norm": [
                nn.Conv2d(3, 4, 3),
                nn.Flatten(2),
                nn.RMSNorm(36),
                nn.Unflatten(2, (6, 6)),
            ],
            "one layer twice": [nn.Conv2d(3, 4, 3), *[nn.GroupNorm(2, 4), nn.ReLU()] * 2],
        }[name]
        return nn.Sequential(*layers, *end)


FAMILIES = {
    "groupnorm": ["1"],
    "convnext": ["1", "2.block.2"],
    "no norm": ["0", "2"],
    "norm first": ["0"],
    "instance norm": ["1"],
    "rms norm": ["2"],
    "one layer twice": ["1"],
    "vit": (
        [f"encoder.layers.encoder_layer_{i}.ln_{j}" for i in (0, 1) for j in (1, 2)]
        + ["encoder.ln"]
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_neurons_of_other_families(name, images, rng):
    """A mask equals scales multiplied by hand, and single channels are pruned."""
    model = family(name).eval()
    mask = random_mask(model, rng)
    assert list(mask) == FAMILIES[name]
    by_hand = copy.deepcopy(model)
    for layer, value in mask.items():
        for channel, factor in enumerate(value):
            by_hand.get_submodule(layer).weight.data[channel] *= factor
    assert torch.allclose(forward_masked(model, images, mask), by_hand(images), atol=1e-6)
    first = FAMILIES[name][0]
    pruned = prune(model, [(first, 2)], zero_bias=True).get_submodule(first)
    assert not pruned.weight[2].any() and pruned.weight[1].any()
    assert bias(pruned) is None or bias(pruned)[2] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_method_runs_on_other_families(name, toy_set, rng):
    from rnp.prune import Prune
    from rnp.recover import Recover
    from rnp.unlearn import Unlearn

    model = family(name).eval()
    data = toy_set(24)
    unlearned = Unlearn(epochs=2, until_collapse=False)(model, data, rng=rng())
    recovered = Recover(steps=2)(unlearned.model, data, rng=rng())
    pruned = Prune(rule="number", num_neurons=2)(model, recovered.mask, data)
    differing = [a != b for a, b in zip(model.parameters(), pruned.model.parameters())]
    changed = sum(int(d.reshape(len(d), -1).any(1).sum()) for d in differing)
    assert changed == 2 and len(pruned.neurons) == 2
    anything = Prune(max_loss_increase=10.0, max_accuracy_drop=0.99, max_fraction=0.5)
    num_neurons = sum(len(value) for value in recovered.mask.values())
    assert anything(model, recovered.mask, data).chosen.pruned == num_neurons // 2


@pytest.mark.parametrize(
    "arch, layers, neurons",
    [
        ("resnet18_gn", 20, 300),
        ("vgg11", 8, 172),
        ("convnext", 17, 248),
        ("vit", 13, 208),
        ("torchvision:efficientnet_b0", 49, 21008),
    ],
)
def test_neurons_of_whole_architectures(arch, layers, neurons, rng):
    """By hand: ResNet-18 at width 4 has 1/16 of the published 4,800; VGG-11 has 43 times its width;
    a transformer has two norms of 16 per block.
    """
    scales = [layer.weight for layer in maskable(build(arch, rng, width=4)).values()]
    assert (len(scales), sum(len(scale) for scale in scales)) == (layers, neurons)


class Standardized(nn.Conv2d):
    """Its kernel has unit deviation whatever its scale, so a mask would have no effect."""

    def forward(self, x):
        return self._conv_forward(
            x, self.weight / self.weight.std((1, 2, 3), keepdim=True), self.bias
        )


def tied(part):
    layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3), nn.GroupNorm(3, 3))
    setattr(layers[2], part, getattr(layers[1], part))
    return layers


@pytest.mark.parametrize(
    "model, words",
    [
        (lambda: tied("weight"), "layers 1 and 2 share a weight"),
        (lambda: tied("bias"), "layers 1 and 2 share a weight"),
        (
            lambda: nn.Sequential(Standardized(3, 4, 1)),
            r"layer 0 \(Standardized\) recomputes its weight",
        ),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1))),
            "recomputes its weight",
        ),
        (
            lambda: nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(3, 4, 1))),
            "recomputes its weight",
        ),
    ],
)
def test_a_scale_that_is_not_the_layers_own_is_refused(model, words):
    with pytest.raises(UserError, match=words):
        maskable(model())


def test_running_statistics_require_batchnorm(toy_model):
    assert list(batch_norms(toy_model(), "bnp")) == ["bn1", "bn2"]
    with pytest.raises(
        UserError,
        match=r"bnp reads BatchNorm's running statistics, which layer 1 \(GroupNorm\) lacks",
    ):
        batch_norms(family("groupnorm"), "bnp")


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_statistics_still_train_the_scale(frozen, toy_model, images):
    model = freeze_statistics(toy_model(), frozen)
    before = model.bn1.running_mean.clone()
    model(images).sum().backward()
    assert model.training and model.bn1.weight.grad is not None
    assert torch.equal(model.bn1.running_mean, before) == frozen
