"""Architectures by name."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.models import convnext, mobilenet, resnet, vgg, vit
from rnp.models.classifier import Classifier, choose_layout
from rnp.models.names import ARCHITECTURES, TIMM, TORCHVISION
from rnp.params.ranges import Hyperparameters
from rnp.registry import suggest
from rnp.types import ImageSet, to_floats

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "resnet10": lambda k, **kw: resnet.ResNet(resnet.Basic, (1, 1, 1, 1), k, **kw),
    "resnet18": lambda k, **kw: resnet.ResNet(resnet.Basic, (2, 2, 2, 2), k, **kw),
    "resnet34": lambda k, **kw: resnet.ResNet(resnet.Basic, (3, 4, 6, 3), k, **kw),
    "resnet50": lambda k, **kw: resnet.ResNet(resnet.Bottleneck, (3, 4, 6, 3), k, **kw),
    "preactresnet18": lambda k, **kw: resnet.ResNet(resnet.PreActivation, (2, 2, 2, 2), k, **kw),
    "wrn16_1": lambda k, **kw: resnet.ResNet(resnet.PreActivation, (2, 2, 2), k, **kw),
    "resnet18_gn": lambda k, **kw: resnet.with_group_norms(
        resnet.ResNet(resnet.Basic, (2, 2, 2, 2), k, **kw)
    ),
    "vgg11": lambda k, **kw: vgg.VGG(vgg.VGG11, False, k, **kw),
    "vgg19_bn": lambda k, **kw: vgg.VGG(vgg.VGG19, True, k, **kw),
    "mobilenet_v2": mobilenet.MobileNetV2,
    "convnext": convnext.ConvNeXt,
    "vit": lambda k, **kw: vit.ViT(6, k, **kw),
}
assert BUILDERS.keys() == ARCHITECTURES.keys()
REGISTERED: dict[str, Callable[..., nn.Module]] = {}
"""Functions that the user named as `module:function`.

A file that names one is not trusted, because it could name any code.
"""


def register_function(arch: str) -> None:
    """Allow `arch` in this process if it reads `package.module:function`.

    The function returns a network; its parameter `num_classes`, if it has one, gets the number of
    classes. Other names are left to `Architecture`.

    Raises: UserError when there is no such function.
    """
    module, _, function = arch.partition(":")
    if not function or arch.startswith((TORCHVISION, TIMM)):
        return
    try:
        REGISTERED[arch] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"no function {function!r} can be imported from {module!r}: {error}"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Architecture(Hyperparameters):
    """Which network to build."""

    section: ClassVar[str] = "model"

    arch: Annotated[
        str,
        "architecture: one of `rnp list`, or torchvision:NAME or timm:NAME from these packages",
    ] = "resnet18"
    width: Annotated[
        int, Ge(0), "channels of the first stage; 0 takes the published width; ours only"
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        from_package = self.arch.startswith((TORCHVISION, TIMM))
        if ":" in self.arch and not from_package and self.arch not in REGISTERED:
            raise UserError(
                f"architecture {self.arch!r} is a function, which runs only where it is typed:"
                f" --arch {self.arch}"
            )
        if ":" not in self.arch and self.arch not in ARCHITECTURES:
            known = [*ARCHITECTURES, TORCHVISION + "resnet18"]
            raise UserError(f"unknown architecture {self.arch!r}{suggest(self.arch, known)}")

    def build(
        self, classes: int, channels: int, mean: Tensor, std: Tensor, *, rng: torch.Generator
    ) -> Classifier:
        """A fresh network. Drawn at random: the weights, from `rng` alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=rng)))
            if self.arch.startswith(TORCHVISION):
                net = self._torchvision(classes, channels)
            elif self.arch.startswith(TIMM):
                net = self._timm(classes, channels)
            elif self.arch in REGISTERED:
                net = self._registered(classes)
            else:
                width = self.width or ARCHITECTURES[self.arch]
                net = BUILDERS[self.arch](classes, channels=channels, width=width)
                initialize(net)
        return Classifier(net, mean, std)

    def build_for(self, data: ImageSet, *, rng: torch.Generator) -> Classifier:
        """A fresh network for the images and classes of `data`, normalized by its statistics."""
        model = self.build(len(data.classes), data.shape[0], *statistics(data), rng=rng)
        return choose_layout(model, to_floats(data.images[:2]))

    def _registered(self, classes: int) -> nn.Module:
        function = REGISTERED[self.arch]
        if "num_classes" in inspect.signature(function).parameters:
            return function(num_classes=classes)
        return function()

    def _torchvision(self, classes: int, channels: int) -> nn.Module:
        from torchvision import models  # two seconds to import

        name = self.arch.removeprefix(TORCHVISION)
        known = models.list_models(module=models)
        if name not in known:
            raise UserError(f"torchvision has no classifier {name!r}{suggest(name, known)}")
        if channels != 3:
            raise UserError(
                f"torchvision's networks take 3 channels, the images have {channels}; choose one of"
                " our architectures"
            )
        options = {}
        if name in ("googlenet", "inception_v3"):  # they would return tuples
            options = {"aux_logits": False, "init_weights": True}
        return models.get_model(name, weights=None, num_classes=classes, **options)

    def _timm(self, classes: int, channels: int) -> nn.Module:
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise UserError(
                f"{self.arch} needs the package timm: pip install 'rnp[timm]'"
            ) from error
        name = self.arch.removeprefix(TIMM)
        if not timm.is_model(name):
            raise UserError(f"timm has no network {name!r}{suggest(name, timm.list_models())}")
        return timm.create_model(name, num_classes=classes, in_chans=channels)


def initialize(net: nn.Module) -> None:
    """He initialization by fan-out for convolutions; the classifier keeps PyTorch's default."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size) / module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))


def statistics(data: ImageSet, limit: int = 5000) -> tuple[Float[Tensor, "c"], Float[Tensor, "c"]]:
    """Mean and standard deviation of each channel over the first `limit` images, in [0, 1]."""
    counts = torch.zeros(data.shape[0], 256, dtype=torch.float64)  # of each value in each channel
    for images in data.images[:limit].split(100):
        counts += torch.stack(
            [channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]
        )
    values = torch.arange(256, dtype=torch.float64) / 255
    n = counts.sum(1)
    mean = counts @ values / n
    variance = (counts * (values - mean.unsqueeze(1)).square()).sum(1) / (n - 1)
    return mean.float(), variance.sqrt().float().clamp_min(1e-3)
