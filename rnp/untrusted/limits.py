"""What a file of weights may cost, and words about it that are safe to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt

from rnp.errors import UserError
from rnp.params.ranges import Hyperparameters

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Limits(Hyperparameters):
    """What a file of weights may cost. The defaults fit any image classifier; honest files need no
    more.
    """

    file_size: Annotated[int, Gt(0), "MiB, size of the file, and of what is written"] = 4096
    memory: Annotated[
        int, Gt(0), "MiB, memory of the reading process besides torch itself and twice the file"
    ] = 512
    seconds: Annotated[
        int, Gt(0), "s, time of the reading process, by the clock and by the processor"
    ] = 120
    tensors: Annotated[int, Gt(0), "number of tensors"] = 20_000
    elements: Annotated[int, Gt(0), "number of values in all tensors"] = 1_000_000_000


def sanitize(text: str) -> str:
    """One line without control characters and direction marks, however hostile the names in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quote(text: object) -> str:
    """What a file says, quoted and not too long."""
    text = str(text)
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def over_limit(what: str, found: int, most: int, option: str) -> UserError:
    return UserError(
        f"holds {found:,} {what}, the limit is {most:,}; raise {option} if you expect that"
    )
