"""The header of a safetensors file: nothing in it can run, but all of it can lie."""

from __future__ import annotations

import collections
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Sequence
from typing import BinaryIO, NamedTuple

from rnp.errors import UserError
from rnp.untrusted.limits import MIB, Limits, over_limit, quote

HEADER = 4 * MIB  # bytes of a safetensors header: 20,000 tensors need half of it
NAME = re.compile(r"[\w.:/+@()\[\] -]{1,256}")


class Dtype(NamedTuple):
    torch: str
    bytes: int
    exponent: int | None = None  # the bits that are all set in NaN and infinity


DTYPES = {
    "F64": Dtype("float64", 8, 0x7FF << 52),
    "F32": Dtype("float32", 4, 0xFF << 23),
    "F16": Dtype("float16", 2, 0x1F << 10),
    "BF16": Dtype("bfloat16", 2, 0xFF << 7),
    "F8_E5M2": Dtype("float8_e5m2", 1, 0x7C),
    "F8_E4M3": Dtype("float8_e4m3fn", 1, 0x7F),
    "I64": Dtype("int64", 8),
    "I32": Dtype("int32", 4),
    "I16": Dtype("int16", 2),
    "I8": Dtype("int8", 1),
    "U64": Dtype("uint64", 8),
    "U32": Dtype("uint32", 4),
    "U16": Dtype("uint16", 2),
    "U8": Dtype("uint8", 1),
    "BOOL": Dtype("bool", 1),
}


class Entry(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    end: int


# safetensors: a length, a header in JSON, bytes. Nothing in it can run, but all of it can lie.


def malformed(why: str) -> UserError:
    return UserError(f"is no sound safetensors file: {why}")


def read_header(file: BinaryIO, limits: Limits) -> dict[str, Entry]:
    """The tensors of a safetensors file.

    Raises: UserError unless the header is sound and its tensors fill the file exactly, side by
    side.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size < 8:
        raise malformed(f"it has {size} bytes")
    length = struct.unpack("<Q", file.read(8))[0]
    most = min(HEADER, size - 8)
    if length > most:
        raise malformed(f"its header claims {length:,} bytes, of at most {most:,}")
    try:
        described = json.loads(file.read(length).decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise malformed("its header is no JSON") from None
    if not isinstance(described, dict):
        raise malformed("its header is no JSON object")
    meta = described.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise malformed("its metadata are not text")
    if len(described) > limits.tensors:
        raise over_limit("tensors", len(described), limits.tensors, "tensors")
    entries = {name: entry(name, what, 8 + length, limits) for name, what in described.items()}
    if not entries:
        raise UserError("holds no tensors")
    elements = sum(math.prod(entry.shape) for entry in entries.values())
    if elements > limits.elements:
        raise over_limit("values", elements, limits.elements, "elements")
    at = 8 + length
    for name, found in sorted(entries.items(), key=lambda item: item[1][2:]):
        if found.start != at:
            raise malformed(f"{quote(name)} overlaps another tensor, or leaves a gap")
        at = found.end
    if at != size:
        raise malformed(f"its tensors end at byte {at:,}, the file at {size:,}")
    return entries


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    twice = [
        name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1
    ]
    if twice:
        raise malformed(f"its header has {quote(twice[0])} twice")
    return dict(pairs)


def entry(name: str, what: object, offset: int, limits: Limits) -> Entry:
    """One tensor's description, checked by itself; the data begin at `offset`."""
    if not NAME.fullmatch(name):
        raise UserError(f"has a tensor with a name that no layer has: {quote(name)}")
    if not isinstance(what, dict) or what.keys() != {"dtype", "shape", "data_offsets"}:
        raise malformed(f"{quote(name)} lacks a dtype, shape or offsets")
    dtype, shape, offsets = what["dtype"], what["shape"], what["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"has {quote(name)} of dtype {quote(dtype)}; known are {', '.join(DTYPES)}")
    if (
        not is_list_of_sizes(shape)
        or len(shape) > 8
        or any(side > limits.elements for side in shape)
    ):
        raise UserError(
            f"has {quote(name)} of shape {quote(shape)}; up to 8 sides from 0 to"
            f" {limits.elements:,} make sense"
        )
    if (
        not is_list_of_sizes(offsets)
        or len(offsets) != 2
        or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].bytes
    ):
        raise malformed(f"{quote(name)}, {dtype} {shape}, cannot lie at bytes {quote(offsets)}")
    return Entry(dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


def is_list_of_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def make_header(tensors: Iterable[tuple[str, str, Sequence[int]]], meta: dict[str, str]) -> bytes:
    """The start of a safetensors file whose tensors (name, dtype, shape) follow in this order."""
    described: dict[str, object] = {"__metadata__": meta} if meta else {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * DTYPES[dtype].bytes
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
