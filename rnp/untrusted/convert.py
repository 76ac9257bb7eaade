"""Untrusted weights: whatever file they come in, they leave it as checked safetensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rnp.errors import UserError
from rnp.untrusted.limits import MIB, Limits, over_limit, quote, sanitize
from rnp.untrusted.safetensors_header import DTYPES, Dtype, Entry, make_header, read_header
from rnp.untrusted.sandbox import run_sandboxed

CHUNK = 8 * MIB
PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel, Lightning, torch.compile


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What came out of a file; `isolation` is empty for safetensors, which are read as data."""

    input_sha256: str
    output_sha256: str
    key: str  # under which the state dict was found; empty when it was the file's only content
    prefix: str  # that all names carried, and now do not
    tensors: int
    elements: int
    isolation: dict[str, bool]  # each measure, and whether this system granted it


def convert(source: Path, target: Path, limits: Limits = Limits()) -> Converted:
    """Write the weights in `source` to `target`, as safetensors with sorted names and without a
    common prefix.

    The same input gives the same output, byte by byte; `target` appears whole or not at all.
    `source` is opened once, and read as data when it is safetensors, else by `run_sandboxed`.

    Raises: UserError, in one line that is safe to print, when the file is hostile, damaged, too
    large or holds no weights.
    """
    try:
        return _convert(source, target, limits)
    except UserError as error:
        raise UserError(sanitize(f"{source} {error}")) from None
    except PermissionError as error:
        raise UserError(
            sanitize(f"{error.filename} may not be opened; change its permissions")
        ) from None


def _convert(source: Path, target: Path, limits: Limits) -> Converted:
    from rnp.io.files import atomic_write, sha256
    from rnp.io.tensors import META

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
    with (
        source.open("rb") as file,
        atomic_write(target) as draft,
        tempfile.TemporaryFile(dir=target.parent) as raw,
    ):
        size = os.fstat(file.fileno()).st_size
        if size > limits.file_size * MIB:
            raise over_limit("bytes", size, limits.file_size * MIB, "file_size")
        head = file.read(9)
        if not head:
            raise UserError("is empty")
        file.seek(0)
        key, isolation = "", {}
        if source.suffix == ".safetensors" or head.endswith(b"{"):
            raw = file
        else:
            key, isolation = run_sandboxed(file, raw, limits)
        entries = read_header(raw, limits)
        prefix = common_prefix(entries)
        file.seek(0)
        meta = {
            "kind": "weights",
            "source": hashlib.file_digest(file, "sha256").hexdigest(),
            "key": key,
            "prefix": prefix,
        }
        rewrite(raw, entries, prefix, draft, {META: json.dumps(meta, sort_keys=True)})
        output = sha256(draft)
    elements = sum(math.prod(entry.shape) for entry in entries.values())
    return Converted(
        input_sha256=meta["source"],
        output_sha256=output,
        key=key,
        prefix=prefix,
        tensors=len(entries),
        elements=elements,
        isolation=isolation,
    )


def common_prefix(names: Iterable[str]) -> str:
    """The wrappers' prefixes, one after another, that every name carries."""
    prefix = ""
    while found := [
        p
        for p in PREFIXES
        if all(name.startswith(prefix + p) and name != prefix + p for name in names)
    ]:
        prefix += found[0]
    return prefix


def rewrite(
    file: BinaryIO, entries: dict[str, Entry], prefix: str, draft: Path, meta: dict[str, str]
) -> None:
    """Copy all tensors.

    Raises: UserError at the first that is not finite.
    """
    order = sorted(
        entries.items(), key=lambda item: (-DTYPES[item[1].dtype].bytes, item[0])
    )  # larger ones first: aligned
    with draft.open("wb") as out:
        out.write(
            make_header([(name.removeprefix(prefix), e.dtype, e.shape) for name, e in order], meta)
        )
        for name, found in order:
            for chunk in chunks(file, found.start, found.end):
                if not is_finite(chunk, DTYPES[found.dtype]):
                    raise UserError(
                        f"has NaN or infinite values in {quote(name)}; no network works with them"
                    )
                out.write(chunk)


def chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    for at in range(start, end, CHUNK):
        chunk = file.read(min(CHUNK, end - at))
        if len(chunk) < min(CHUNK, end - at):
            raise UserError("became shorter while it was read")
        yield chunk


def is_finite(chunk: bytes, dtype: Dtype) -> bool:
    import numpy as np

    return (
        dtype.exponent is None
        or not (np.frombuffer(chunk, f"<u{dtype.bytes}") & dtype.exponent == dtype.exponent).any()
    )
