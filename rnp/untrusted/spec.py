"""What the user says about an untrusted model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Interval

from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters
from rnp.untrusted.images import MIN_IMAGES


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Hyperparameters):
    """What there is to know about a stranger's model and images, besides the files."""

    section: ClassVar[str] = "model"

    arch: Annotated[
        str,
        "architecture: one of ours, torchvision:NAME, timm:NAME, or package.module:function; rnp's"
        " files say it",
    ] = ""
    width: Annotated[
        int,
        Ge(0),
        "channels of the first stage, of ours; 0 takes the published width, or what the file says",
    ] = 0
    mean: Annotated[
        str,
        "mean of each input channel, in [0, 1], with commas; torchvision's and timm's have"
        " ImageNet's",
    ] = ""
    std: Annotated[str, "deviation of each input channel, with commas"] = ""
    size: Annotated[
        int,
        Ge(0),
        "side of the square input, in pixels; 0 takes 32, or 224 for torchvision and timm",
    ] = 0
    classes: Annotated[
        str,
        "names of the outputs in order, with commas or as a file with one a line; else the folders'"
        " names",
    ] = ""
    images: Annotated[
        int, Ge(MIN_IMAGES), "clean images to use at most: half to optimize on, all to choose with"
    ] = 1000
    confidence: Annotated[
        float,
        Interval(ge=0, lt=1),
        "images without labels: the model's own probability above which its answer is taken"
        " for one",
    ] = 0.9

    def side(self, arch: str) -> int:
        return self.size or (224 if ":" in arch else 32)

    def numbers(self, name: str) -> list[float]:
        try:
            return [float(part) for part in getattr(self, name).split(",") if part.strip()]
        except ValueError:
            raise UserError(
                f"--{name} takes numbers with commas between them, got {getattr(self, name)!r}"
            ) from None

    def names(self) -> list[str]:
        """The classes that were typed, or the lines of the file that was."""
        file = Path(self.classes)
        lines = (
            file.read_text().splitlines()
            if self.classes and file.is_file()
            else self.classes.split(",")
        )
        return [line.strip() for line in lines if line.strip()]
