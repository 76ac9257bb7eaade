"""Architectures by name; normalization is the first layer of each."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from rnp.errors import UserError
from rnp.models import convnext, mobilenet, resnet, vgg, vit
from rnp.models.classifier import Classifier, settle
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
"""Functions that the user named as `module:function`. A file that names one is not believed: it
could name any code.
"""


def register_function(arch: str) -> None:
    """Let `arch` be used in this process when it reads `package.module:function`; other names are
    left to `Architecture`.

    The function returns a network and takes the number of classes as `num_classes`, if at all.

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
        "architecture: `rnp list` names ours; torchvision:NAME and timm:NAME take those of these"
        " packages",
    ] = "resnet18"
    width: Annotated[
        int, Ge(0), "channels of the first stage; 0 takes the published width; ours only"
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            ":" in self.arch
            and not self.arch.startswith((TORCHVISION, TIMM))
            and self.arch not in REGISTERED
        ):
            raise UserError(
                f"architecture {self.arch!r} is a function, which runs only where it is typed:"
                f" --arch {self.arch}"
            )
        if ":" not in self.arch and self.arch not in ARCHITECTURES:
            raise UserError(
                "unknown architecture"
                f" {self.arch!r}{suggest(self.arch, [*ARCHITECTURES, TORCHVISION + 'resnet18'])}"
            )

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
                takes = inspect.signature(REGISTERED[self.arch]).parameters
                net = REGISTERED[self.arch](
                    **({"num_classes": classes} if "num_classes" in takes else {})
                )
            else:
                net = BUILDERS[self.arch](
                    classes, channels=channels, width=self.width or ARCHITECTURES[self.arch]
                )
                initialize(net)
        return Classifier(net, mean, std)

    def build_for(self, data: ImageSet, *, rng: torch.Generator) -> Classifier:
        """A fresh network for images and classes like those of `data`, by whose statistics it
        normalizes.
        """
        model = self.build(len(data.classes), data.shape[0], *statistics(data), rng=rng)
        return settle(model, to_floats(data.images[:2]))

    def _torchvision(self, classes: int, channels: int) -> nn.Module:
        from torchvision import models  # two seconds to import

        name = self.arch.removeprefix(TORCHVISION)
        if name not in models.list_models(module=models):
            raise UserError(
                "torchvision has no classifier"
                f" {name!r}{suggest(name, models.list_models(module=models))}"
            )
        if channels != 3:
            raise UserError(
                f"torchvision's networks take 3 channels, the images have {channels}; choose one of"
                " our architectures"
            )
        own = (
            {"aux_logits": False, "init_weights": True}
            if name in ("googlenet", "inception_v3")
            else {}
        )  # else they return tuples
        return models.get_model(name, weights=None, num_classes=classes, **own)

    def _timm(self, classes: int, channels: int) -> nn.Module:
        try:
            import timm
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


def statistics(data: ImageSet, limit: int = 5000) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel over the first `limit` images, as fractions of full
    scale.
    """
    counts = torch.zeros(
        data.shape[0], 256, dtype=torch.float64
    )  # how often each channel has each value
    for images in data.images[:limit].split(100):
        counts += torch.stack(
            [channel.flatten().bincount(minlength=256) for channel in images.unbind(1)]
        )
    values, n = torch.arange(256, dtype=torch.float64) / 255, counts.sum(1)
    mean = counts @ values / n
    variance = (counts * (values - mean.unsqueeze(1)).square()).sum(1) / (n - 1)
    return mean.float(), variance.sqrt().float().clamp_min(1e-3)
