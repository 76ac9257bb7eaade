"""Convert an untrusted file of weights of any format to checked safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rnp.errors import UserError
from rnp.untrusted.limits import MIB, Limits, over_limit, quote, sanitize
from rnp.untrusted.safetensors_header import DTYPES, Dtype, Entry, make_header, read_header
from rnp.untrusted.sandbox import run_sandboxed

CHUNK = 8 * MIB
PREFIXES = ("module.", "model.", "_orig_mod.")
"""What DataParallel, Lightning and torch.compile put before every name."""


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What was read from a file.

    `key` is where the weights were found, empty when they were the whole file; `prefix` was
    removed from all names. `isolation` has each measure that protects from the file, and whether
    the system granted it; it is empty for safetensors, which are read as data.
    """

    input_sha256: str
    output_sha256: str
    key: str
    prefix: str
    tensors: int
    elements: int
    isolation: dict[str, bool]


def convert(source: Path, target: Path, limits: Limits = Limits()) -> Converted:
    """Write the weights in `source` to `target` as safetensors, sorted and without common prefix.

    The same input gives the same bytes; `target` is written completely or not at all. `source` is
    opened once; what is no safetensors file is read by `run_sandboxed`.

    Raises: UserError, in one line that is safe to print, when the file is hostile, damaged, too
    large or holds no weights.
    """
    try:
        require_paths(source, target)
        return _convert(source, target, limits)
    except UserError as error:
        raise UserError(sanitize(f"{source} {error}")) from None
    except PermissionError as error:
        raise UserError(
            sanitize(f"{error.filename} may not be opened; change its permissions")
        ) from None


def require_paths(source: Path, target: Path) -> None:
    """Raises: UserError unless `source` is a file and `target` can become another one."""
    if not source.is_file():
        raise UserError("does not exist, or is no file")
    if target.exists() and target.samefile(source):
        raise UserError("cannot be its own output; name another file")
    if target.suffix != ".safetensors":
        raise UserError(
            f"becomes safetensors, so the output must end in .safetensors, got {target.name}"
        )
    if target.is_dir():
        raise UserError(f"cannot become {target}, which is a folder; name another file")


def _convert(source: Path, target: Path, limits: Limits) -> Converted:
    from rnp.io.files import atomic_write, sha256
    from rnp.io.tensors import META

    with (
        source.open("rb") as file,
        atomic_write(target) as draft,
        tempfile.TemporaryFile(dir=target.parent) as raw,
    ):
        if is_safetensors(source, file, limits):
            tensors: BinaryIO = file
            key, isolation = "", {}
        else:
            tensors = raw
            key, isolation = run_sandboxed(file, raw, limits)
        entries = read_header(tensors, limits)
        prefix = common_prefix(entries)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        origin = {"kind": "weights", "source": digest, "key": key, "prefix": prefix}
        metadata = {META: json.dumps(origin, sort_keys=True)}
        rewrite(tensors, entries, prefix, draft, metadata)
        return Converted(
            input_sha256=digest,
            output_sha256=sha256(draft),
            key=key,
            prefix=prefix,
            tensors=len(entries),
            elements=sum(math.prod(entry.shape) for entry in entries.values()),
            isolation=isolation,
        )


def is_safetensors(source: Path, file: BinaryIO, limits: Limits) -> bool:
    """Whether the file is to be read as safetensors, by its name or its first bytes.

    Raises: UserError when it is empty or too large.
    """
    size = os.fstat(file.fileno()).st_size
    if size > limits.file_size * MIB:
        raise over_limit("bytes", size, limits.file_size * MIB, "file_size")
    head = file.read(9)
    if not head:
        raise UserError("is empty")
    file.seek(0)
    return source.suffix == ".safetensors" or head.endswith(b"{")


def common_prefix(names: Collection[str]) -> str:
    """The wrappers' prefixes, one after another, that every name carries."""
    prefix = ""
    while True:
        longer = [prefix + wrapper for wrapper in PREFIXES]
        shared = [
            candidate
            for candidate in longer
            if all(name.startswith(candidate) and name != candidate for name in names)
        ]
        if not shared:
            return prefix
        prefix = shared[0]


def rewrite(
    file: BinaryIO, entries: dict[str, Entry], prefix: str, draft: Path, metadata: dict[str, str]
) -> None:
    """Copy all tensors, without `prefix` in their names, to a new safetensors file.

    Raises: UserError at the first value that is not finite.
    """
    # Types of more bytes come first, so that all tensors are aligned.
    order = sorted(entries.items(), key=lambda item: (-DTYPES[item[1].dtype].bytes, item[0]))
    described = [(name.removeprefix(prefix), e.dtype, e.shape) for name, e in order]
    with draft.open("wb") as out:
        out.write(make_header(described, metadata))
        for name, entry in order:
            for chunk in chunks(file, entry.start, entry.end):
                if not is_finite(chunk, DTYPES[entry.dtype]):
                    raise UserError(
                        f"has NaN or infinite values in {quote(name)}; no network works with them"
                    )
                out.write(chunk)


def chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end`, in parts of `CHUNK`.

    Raises: UserError when the file ends before.
    """
    file.seek(start)
    for position in range(start, end, CHUNK):
        length = min(CHUNK, end - position)
        chunk = file.read(length)
        if len(chunk) < length:
            raise UserError("became shorter while it was read")
        yield chunk


def is_finite(chunk: bytes, dtype: Dtype) -> bool:
    """Whether no value has all bits of its exponent set, as NaN and infinity have."""
    import numpy as np

    if dtype.exponent is None:
        return True
    bits = np.frombuffer(chunk, f"<u{dtype.bytes}")
    return not (bits & dtype.exponent == dtype.exponent).any()
