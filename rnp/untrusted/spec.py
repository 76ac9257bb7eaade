"""What a user states about an untrusted model and its images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from annotated_types import Ge, Interval

from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters

MIN_IMAGES = 20
"""Images below which no repair is attempted."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec(Hyperparameters):
    """Facts about an untrusted model and its images that the files do not state."""

    section: ClassVar[str] = "model"

    arch: Annotated[
        str,
        "architecture: a name of `rnp list`, torchvision:NAME, timm:NAME, or"
        " package.module:function; files of rnp state it",
    ] = ""
    width: Annotated[
        int,
        Ge(0),
        "channels of the first stage, for architectures of `rnp list`; 0 takes the published width,"
        " or what the file states",
    ] = 0
    mean: Annotated[
        str,
        "mean of each input channel, in [0, 1], separated by commas; torchvision's and timm's"
        " networks take that of ImageNet if it is left out",
    ] = ""
    std: Annotated[
        str, "standard deviation of each input channel, separated by commas; as with the mean"
    ] = ""
    image_size: Annotated[
        int,
        Ge(0),
        "side of the square input, in pixels; 0 takes 32, or 224 for torchvision and timm",
    ] = 0
    class_names: Annotated[
        str,
        "names of the outputs in order, separated by commas, or a file with one name per line;"
        " left out, the names of the folders",
    ] = ""
    max_images: Annotated[
        int,
        Ge(MIN_IMAGES),
        "clean images to use at most: half of them to optimize on, all to choose with",
    ] = 1000
    pseudo_label_confidence: Annotated[
        float,
        Interval(ge=0, lt=1),
        "for images without labels: the model's prediction becomes the label from this"
        " probability on",
    ] = 0.9

    def input_size(self, arch: str) -> int:
        """The side of the square input of `arch`, in pixels."""
        return self.image_size or (224 if ":" in arch else 32)

    def channel_values(self, name: str) -> list[float]:
        """The numbers in the field `name`, `mean` or `std`.

        Raises: UserError when it holds anything else.
        """
        text: str = getattr(self, name)
        try:
            return [float(part) for part in text.split(",") if part.strip()]
        except ValueError:
            raise UserError(f"--{name} takes numbers separated by commas, got {text!r}") from None

    def list_class_names(self) -> list[str]:
        """The names in `class_names`, or the lines of the file that it names."""
        file = Path(self.class_names)
        from_file = bool(self.class_names) and file.is_file()
        names = file.read_text().splitlines() if from_file else self.class_names.split(",")
        return [name.strip() for name in names if name.strip()]
