"""Check a checkpoint of torch.save from outside, without PyTorch and without running its pickle."""

from __future__ import annotations

import collections
import io
import os
import pickletools
import zipfile
from typing import IO, BinaryIO, cast

from rnp.errors import UserError
from rnp.untrusted.limits import quote
from rnp.untrusted.safetensors_header import DTYPES

EXPORT = (
    "on the machine that made it, export the weights alone:"
    " safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
)
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of a file that torch.save wrote before it wrote zip archives."""

ALLOWED = {
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "__builtin__.set",
    "builtins.set",
    *(
        f"torch._utils._rebuild_{kind}"
        for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter")
    ),
    *(f"torch.{kind}Storage" for kind in ("Double", "Float", "Half", "BFloat16")),
    *(f"torch.{kind}Storage" for kind in ("Long", "Int", "Short", "Char", "Byte", "Bool")),
    "torch.storage.UntypedStorage",
    "torch.Size",
    "torch.device",
    *(f"torch.{dtype.torch}" for dtype in DTYPES.values()),
}
"""Globals that weights and the usual counters beside them need.

They are fewer than those that torch's restricted unpickler allows.
"""


def check(file: BinaryIO) -> None:
    """Check a checkpoint from outside: that needs no PyTorch and refuses most hostile files.

    Raises: UserError that says what is wrong; whatever zipfile and pickletools raise for damaged
    files.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) == b"PK\x03\x04":  # torch.load tells the two formats apart by this too
        check_archive(zipfile.ZipFile(file), size)
    else:
        check_legacy(file)


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Check a zip archive's directory and checksums, and the globals in its pickle.

    Raises: UserError unless torch.save can have written it.
    """
    check_records(archive)
    records = archive.infolist()
    packed = [
        record
        for record in records
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size
    ]
    if packed:
        raise UserError(
            f"is a zip archive that torch.save did not write: {quote(packed[0].filename)} is"
            f" compressed, from {packed[0].file_size:,} bytes"
        )
    claimed = sum(record.file_size for record in records)
    if claimed > size:
        raise UserError(
            f"is a zip archive with a false directory: it claims {claimed:,} bytes, the file has"
            f" {size:,}"
        )
    root = records[0].filename.partition("/")[0]
    with archive.open(f"{root}/data.pkl") as stream:
        check_pickle(stream)
    damaged = archive.testzip()
    if damaged:
        raise UserError(
            f"is damaged: the checksum of {quote(damaged)} is wrong; copy or download it again"
        )


def check_records(archive: zipfile.ZipFile) -> None:
    """Raises: UserError unless the names in the archive are those of torch.save."""
    parts = [name.partition("/") for name in archive.namelist()]
    roots = {root for root, _, _ in parts}
    names = {name for _, _, name in parts}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise UserError(f"is a TorchScript archive, which is a program; {EXPORT}")
    if {"archive_format", "serialized_exported_program.json"} & (names | roots):
        raise UserError(f"is an archive of torch.export (.pt2), which is a program; {EXPORT}")
    if "data.pkl" not in names:
        raise UserError("is a zip archive that torch.save did not write: it has no data.pkl")
    if len(roots) > 1 or len({name.lower() for name in names}) < len(parts):
        raise UserError(
            "is a zip archive that torch.save did not write: it has a record twice, or several"
            " folders"
        )


def check_legacy(file: BinaryIO) -> None:
    """Check the pickles of a file that torch.save wrote before it wrote zip archives.

    The raw storages that follow them hold no code.

    Raises: UserError when it is another kind of file.
    """
    file.seek(257)
    if file.read(5) == b"ustar":
        raise UserError(
            "is a tar archive, as torch's first versions wrote; its restricted unpickler reads"
            f" none; {EXPORT}"
        )
    file.seek(0)
    magic = file.read(len(LEGACY_MAGIC))
    file.seek(0)
    try:
        for part in range(5):  # magic number, version, system, content, keys of the storages
            check_pickle(file)
            if part == 0 and magic != LEGACY_MAGIC:
                raise UserError(f"is a pickle that torch.save did not write; {EXPORT}")
    except ValueError:
        raise UserError(
            "is neither safetensors nor a checkpoint of torch.save, or it is damaged"
        ) from None


def check_pickle(stream: IO[bytes] | io.BufferedIOBase) -> None:
    """Read the operations of one pickle without carrying them out.

    Raises: UserError naming the first global that weights do not need, or the protocol;
    ValueError when it is no pickle.
    """
    protocol = 0
    memo: dict[object, str] = {}
    strings = collections.deque(["?", "?"], maxlen=2)  # protocol 4: module and name of a global
    for operation, value, _ in pickletools.genops(cast("IO[bytes]", stream)):
        code = operation.name
        if code == "PROTO":
            protocol = value
        elif code in ("GLOBAL", "INST"):
            require_allowed_global(str(value).replace(" ", "."))
        elif code == "STACK_GLOBAL":
            require_allowed_global(".".join(strings))
        elif code.startswith("EXT"):
            require_allowed_global(f"copyreg extension {value}")
        elif code == "MEMOIZE":
            memo[len(memo)] = strings[-1]
        elif code.endswith("PUT"):
            memo[value] = strings[-1]
        elif code.endswith("GET"):
            strings.append(memo.get(value, "?"))
        elif isinstance(value, str):
            strings.append(value)
    if protocol != 2:
        raise UserError(
            f"is a pickle of protocol {protocol}, and torch's restricted unpickler reads protocol"
            f" 2; {EXPORT}"
        )


def require_allowed_global(name: str) -> None:
    """Raises: UserError for a global that weights do not need."""
    if name not in ALLOWED:
        raise UserError(
            f"asks for {quote(name)}, which weights do not need, and is refused; {EXPORT}"
        )
