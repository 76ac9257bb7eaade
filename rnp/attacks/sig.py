"""SIG: a faint sinusoid over images of the target class, which keep their label."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from rnp.attacks.base import Add, Attack, draw
from rnp.errors import UserError
from rnp.types import ImageSet, Indices, Labels

LARGEST_SHARE = 0.8  # of the target class; poisoning all of it leaves no clean image of the class and costs accuracy


@dataclass(frozen=True, kw_only=True)
class SIG(Attack):
    """Clean-label: only images of the target class are poisoned, at most 80 % of them. Nothing of the wave is random.

    Source: Barni, Kallas, Tondi, ICIP 2019, arXiv 1902.11237, eq. 1.
    Differs: the wave is added in float, clipped and rounded; public mask files wrap its negative half.
    """

    poison_rate: Annotated[float, "share of the whole training set that is poisoned"] = 0.05
    amplitude: Annotated[float, "height of the wave, as a fraction of full scale"] = 40 / 255
    frequency: Annotated[float, "waves per image width"] = 6

    def choose(self, labels: Labels, *, rng: torch.Generator) -> Indices:
        members = labels == self.target_label
        wanted, most = round(self.poison_rate * len(labels)), int(LARGEST_SHARE * members.sum())
        if wanted > most:
            raise UserError(f"poison_rate {self.poison_rate:g} asks for {wanted} images of class {self.target_label}, which has"
                            f" {int(members.sum())}; a clean-label attack may take 80 % of them,"
                            f" poison_rate {most / len(labels):.3g}")
        return draw(members, wanted, rng, "poison_rate")

    def make_trigger(self, clean: ImageSet, *, rng: torch.Generator, surrogate: nn.Module | None = None) -> Add:
        channels, height, width = clean.shape
        wave = self.amplitude * (2 * math.pi * self.frequency * torch.arange(width) / width).sin()
        return Add(wave.expand(channels, height, width).clone())
