"""Untrusted weights fit an architecture exactly or are refused."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from rnp.errors import UserError
from rnp.io.models import load_model, save_model
from rnp.io.tensors import save_tensors
from rnp.models.build import REGISTERED, Architecture
from rnp.untrusted.model import load_untrusted_model, output_size

STATS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}


def network(num_classes):
    """What a user's own module might hold."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )


def weightless():
    return network(5)


@pytest.fixture
def file(tmp_path):
    """`file(state, name)`: a file of weights."""

    def write(state, name="a.safetensors"):
        path = tmp_path / name
        state = {
            key: value.contiguous() if isinstance(value, torch.Tensor) else value
            for key, value in state.items()
        }
        torch.save(state, path) if name.endswith(".pth") else save_file(state, path)
        return path

    return write


def weights(classes=5, arch="resnet10", width=4, seed=1):
    architecture = Architecture(arch=arch, width=width)
    return architecture.build(
        classes, 3, torch.zeros(3), torch.ones(3), rng=torch.Generator().manual_seed(seed)
    ).net.state_dict()


@pytest.mark.parametrize("classes", [2, 3, 10, 43, 200])
def test_the_number_of_classes_comes_from_the_weights(file, classes):
    adopted = load_untrusted_model(file(weights(classes)), arch="resnet10", width=4, **STATS)
    assert (
        output_size(adopted.model, 16) == classes
        and not adopted.has_normalization
        and not adopted.model.training
    )
    state = weights(classes)
    assert all(
        torch.equal(value, state[name]) for name, value in adopted.named(adopted.model).items()
    )
    assert adopted.model.mean.flatten().tolist() == pytest.approx(STATS["mean"])


@pytest.mark.parametrize(
    "arch", ["vgg19_bn", "mobilenet_v2", "torchvision:resnet18", f"{__name__}:network"]
)
def test_any_architecture(file, arch, monkeypatch):
    monkeypatch.setattr("rnp.models.build.REGISTERED", {})
    state = (
        network(7).state_dict()
        if arch.endswith("network")
        else weights(7, arch, 0 if ":" in arch else 2)
    )
    adopted = load_untrusted_model(file(state), arch=arch, width=0 if ":" in arch else 2, **STATS)
    assert output_size(adopted.model, 32) == 7


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_networks_of_timm(file, name):
    pytest.importorskip("timm", reason="an extra")
    adopted = load_untrusted_model(file(weights(7, f"timm:{name}", 0)), arch=f"timm:{name}")
    assert output_size(
        adopted.model, 32
    ) == 7 and adopted.model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_timm_is_asked_for_where_it_is_missing(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match=r"timm:resnet10t needs the package timm: pip install 'rnp\[timm\]'"
    ):
        load_untrusted_model(file(weights()), arch="timm:resnet10t")


def test_a_function_that_takes_no_number_of_classes(file):
    assert (
        output_size(
            load_untrusted_model(
                file(weightless().state_dict()), arch=f"{__name__}:weightless", **STATS
            ).model,
            16,
        )
        == 5
    )
    REGISTERED.clear()


def test_a_pickled_checkpoint_with_a_prefix(file):
    state = {f"module.{name}": value for name, value in weights().items()}
    adopted = load_untrusted_model(
        file({"state_dict": state, "epoch": 3}, "a.pth"), arch="resnet10", width=4, **STATS
    )
    assert (adopted.converted.key, adopted.converted.prefix) == ("state_dict", "module.")


def test_files_of_rnp_say_what_they_are(tmp_path, rng):
    architecture = Architecture(arch="resnet10", width=4)
    model = architecture.build(4, 3, torch.full((3,), 0.4), torch.full((3,), 0.3), rng=rng())
    save_model(tmp_path / "a.safetensors", model, architecture, ("a", "b", "c", "d"))
    adopted = load_untrusted_model(tmp_path / "a.safetensors")
    assert (
        adopted.has_normalization
        and adopted.classes == ("a", "b", "c", "d")
        and adopted.architecture == architecture
    )
    assert all(
        torch.equal(value, model.state_dict()[name])
        for name, value in adopted.model.state_dict().items()
    )


def test_a_file_cannot_name_a_function(tmp_path):
    """Only the user can: a file's word would run any code on the search path."""
    save_tensors(
        tmp_path / "a.safetensors",
        weights(),
        {"kind": "model", "arch": "os:getcwd", "width": 0, "classes": []},
    )
    with pytest.raises(
        UserError, match="'os:getcwd' is a function, which runs only where it is typed"
    ):
        load_untrusted_model(tmp_path / "a.safetensors", **STATS)
    with pytest.raises(UserError, match="runs only where it is typed"):
        load_model(tmp_path / "a.safetensors")


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: without(s, "fc.bias"), "lacks tensor 'fc.bias'"),
        (lambda s: s | {"extra": torch.ones(1)}, "has an unexpected tensor 'extra'"),
        (
            lambda s: s | {"bn1.weight": torch.ones(9)},
            r"tensor 'bn1.weight' is \[9\], the architecture needs",
        ),
        (
            lambda s: {
                name: value.half() if value.is_floating_point() else value
                for name, value in s.items()
            },
            "is torch.float16",
        ),
        (lambda s: s | {"fc.weight": torch.ones(9, 32)}, "has heads of 5, 9 classes"),
    ],
)
def test_what_does_not_fit_is_refused(file, change, words):
    state = weights()
    state |= {"fc.weight": state["fc.weight"]}
    with pytest.raises(UserError, match=words):
        load_untrusted_model(file(change(state)), arch="resnet10", width=4, **STATS)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({}, "does not say of which architecture it is"),
        ({"arch": "resnet10", "width": 4}, "say how the model's inputs"),
        ({"arch": "nope"}, "unknown architecture"),
        ({"arch": "rnp.nothing:here"}, "no function 'here' can be imported"),
        (
            {"arch": "resnet10", "width": 4, "mean": (0.1,), "std": (0.1, 0.2)},
            "a number per channel",
        ),
        ({"arch": "resnet10", "width": 4, "mean": (0.1,), "std": (0.0,)}, "above 0"),
    ],
)
def test_what_must_be_said(file, said, words):
    with pytest.raises(UserError, match=words):
        load_untrusted_model(file(weights()), **said)
