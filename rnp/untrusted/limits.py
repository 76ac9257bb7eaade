"""Limits for an untrusted file, and messages about it that are safe to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits(Hyperparameters):
    """What a file of weights may need at most; the defaults suffice for image classifiers."""

    file_size: Annotated[int, Gt(0), "size of the input file, and of the output file, in MiB"] = (
        4096
    )
    memory: Annotated[
        int,
        Gt(0),
        "memory of the reading process, in MiB, besides PyTorch and twice the size of the file",
    ] = 512
    seconds: Annotated[
        int, Gt(0), "time of the reading process, in seconds, both elapsed and of the processor"
    ] = 120
    tensors: Annotated[int, Gt(0), "number of tensors"] = 20_000
    elements: Annotated[int, Gt(0), "number of values in all tensors"] = 1_000_000_000


def sanitize(text: str) -> str:
    """`text` as one line, with control characters and direction marks escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quote(text: object) -> str:
    """A value from a file, in quotes, shortened to 80 characters."""
    shown = str(text)
    return repr(shown if len(shown) <= 80 else f"{shown[:80]}...")


def over_limit(unit: str, amount: int, limit: int, option: str) -> UserError:
    """The error for a file with more of `unit` than `option` allows."""
    return UserError(
        f"holds {amount:,} {unit}, the limit is {limit:,}; raise {option} if you expect that"
    )
