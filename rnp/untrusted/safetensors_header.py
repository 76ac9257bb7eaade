"""The header of a safetensors file: no part of it is code, but every part may be false."""

from __future__ import annotations

import collections
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Sequence
from typing import BinaryIO, NamedTuple, TypeGuard

from rnp.errors import UserError
from rnp.untrusted.limits import MIB, Limits, over_limit, quote

MAX_HEADER = 4 * MIB
"""Bytes of a header; 20,000 tensors need half of them."""
MAX_DIMENSIONS = 8
NAME = re.compile(r"[\w.:/+@()\[\] -]{1,256}")


class Dtype(NamedTuple):
    """A type of values: its name in PyTorch and the bytes of one value.

    `exponent` are the bits that are all 1 in NaN and infinity; integers have neither.
    """

    torch: str
    bytes: int
    exponent: int | None = None


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
    """A tensor in a safetensors file; its data are the bytes from `start` to `end` of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def malformed(reason: str) -> UserError:
    return UserError(f"is no sound safetensors file: {reason}")


def read_header(file: BinaryIO, limits: Limits) -> dict[str, Entry]:
    """The tensors of a safetensors file, by name.

    Raises: UserError unless the header is sound and its tensors fill the file exactly.
    """
    size = file.seek(0, os.SEEK_END)
    length, described = read_json_header(file, size)
    if len(described) > limits.tensors:
        raise over_limit("tensors", len(described), limits.tensors, "tensors")
    start = 8 + length
    entries = {name: parse_entry(name, text, start, limits) for name, text in described.items()}
    if not entries:
        raise UserError("holds no tensors")
    elements = sum(math.prod(entry.shape) for entry in entries.values())
    if elements > limits.elements:
        raise over_limit("values", elements, limits.elements, "elements")
    require_contiguous(entries, start, size)
    return entries


def read_json_header(file: BinaryIO, size: int) -> tuple[int, dict[str, object]]:
    """The length of the header of a file of `size` bytes, and its description of each tensor.

    Raises: UserError when it is too long or no JSON object.
    """
    file.seek(0)
    if size < 8:
        raise malformed(f"it has {size} bytes")
    length = struct.unpack("<Q", file.read(8))[0]
    longest = min(MAX_HEADER, size - 8)
    if length > longest:
        raise malformed(f"its header claims {length:,} bytes, of at most {longest:,}")
    try:
        described = json.loads(file.read(length).decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise malformed("its header is no JSON") from None
    if not isinstance(described, dict):
        raise malformed("its header is no JSON object")
    metadata = described.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise malformed("its metadata are not text")
    return length, described


def require_contiguous(entries: dict[str, Entry], start: int, size: int) -> None:
    """Raises: UserError unless the tensors fill the file from `start` to its end."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != position:
            raise malformed(f"{quote(name)} overlaps another tensor, or leaves a gap")
        position = entry.end
    if position != size:
        raise malformed(f"its tensors end at byte {position:,}, the file at {size:,}")


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The pairs as a dictionary.

    Raises: UserError when a name occurs twice, of which JSON would silently keep the last.
    """
    counts = collections.Counter(name for name, _ in pairs)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise malformed(f"its header has {quote(repeated[0])} twice")
    return dict(pairs)


def parse_entry(name: str, described: object, start: int, limits: Limits) -> Entry:
    """One tensor, checked by itself; the data of all tensors begin at byte `start`.

    Raises: UserError when its description is not sound.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"has a tensor with a name that no layer has: {quote(name)}")
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(described, dict) or described.keys() != keys:
        raise malformed(f"{quote(name)} lacks a dtype, shape or offsets")
    dtype = described["dtype"]
    shape = described["shape"]
    offsets = described["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"has {quote(name)} of dtype {quote(dtype)}; known are {', '.join(DTYPES)}")
    if (
        not is_list_of_sizes(shape)
        or len(shape) > MAX_DIMENSIONS
        or any(side > limits.elements for side in shape)
    ):
        raise UserError(
            f"has {quote(name)} of shape {quote(shape)}; up to {MAX_DIMENSIONS} sides from 0 to"
            f" {limits.elements:,} make sense"
        )
    length = math.prod(shape) * DTYPES[dtype].bytes
    if not is_list_of_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != length:
        raise malformed(f"{quote(name)}, {dtype} {shape}, cannot lie at bytes {quote(offsets)}")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def is_list_of_sizes(values: object) -> TypeGuard[list[int]]:
    """Whether `values` are whole numbers of at least 0; `True` is none."""
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def make_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: dict[str, str]
) -> bytes:
    """The first bytes of a safetensors file whose tensors (name, dtype, shape) follow in order."""
    described: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        start = end
        end += math.prod(shape) * DTYPES[dtype].bytes
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
