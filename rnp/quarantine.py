"""Strangers' weights: whatever file they come in, they leave it as checked safetensors, and no
code of the file runs.
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import io
import json
import math
import os
import pickletools
import re
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

from rnp.errors import UserError

# This file is also the program of the process that reads pickles, so torch, numpy and rnp.io are
# imported where they
# are used: most hostile files are refused before that process has loaded any of them.

MIB = 2**20
HEADER = 4 * MIB  # bytes of a safetensors header: 20,000 tensors need half of it
CHUNK = 8 * MIB
OPEN_FILES = 64
ENVIRONMENT = (
    "PATH",
    "HOME",
    "LD_LIBRARY_PATH",
    "SYSTEMROOT",
    "TMPDIR",
)  # what Python and torch need to start
KEYS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")
PREFIXES = ("module.", "model.", "_orig_mod.")  # of DataParallel, Lightning, torch.compile
NAME = re.compile(r"[\w.:/+@()\[\] -]{1,256}")
EXPORT = (
    "on the machine that made it, export the weights alone:"
    " safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
)
MAGIC = (  # what torch.save wrote first before it wrote zip archives
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
)
# Globals that weights and the usual counters beside them need; fewer than torch's restricted
# unpickler allows.
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
}


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
ALLOWED |= {f"torch.{dtype.torch}" for dtype in DTYPES.values()}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a file of weights may cost. The defaults fit any image classifier; honest files need no
    more.
    """

    file_size: Annotated[int, "MiB, size of the file, and of what is written"] = 4096
    memory: Annotated[
        int, "MiB, memory of the reading process besides torch itself and twice the file"
    ] = 512
    seconds: Annotated[int, "s, time of the reading process, by the clock and by the processor"] = (
        120
    )
    tensors: Annotated[int, "number of tensors"] = 20_000
    elements: Annotated[int, "number of values in all tensors"] = 1_000_000_000

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")


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


class Entry(NamedTuple):
    """A tensor in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    end: int


def convert(source: Path, target: Path, limits: Limits = Limits()) -> Converted:
    """Write the weights in `source` to `target`, as safetensors with sorted names and without a
    common prefix.

    The same input gives the same output, byte by byte; `target` appears whole or not at all.
    `source` is opened once, and read as data when it is safetensors, else by `in_own_process`.

    Raises: UserError, in one line that is safe to print, when the file is hostile, damaged, too
    large or holds no weights.
    """
    try:
        return _convert(source, target, limits)
    except UserError as error:
        raise UserError(printable(f"{source} {error}")) from None
    except PermissionError as error:
        raise UserError(
            printable(f"{error.filename} may not be opened; change its permissions")
        ) from None


def _convert(source: Path, target: Path, limits: Limits) -> Converted:
    from rnp.io import META, sha256, whole

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
        whole(target) as draft,
        tempfile.TemporaryFile(dir=target.parent) as raw,
    ):
        size = os.fstat(file.fileno()).st_size
        if size > limits.file_size * MIB:
            raise too_much("bytes", size, limits.file_size * MIB, "file_size")
        head = file.read(9)
        if not head:
            raise UserError("is empty")
        file.seek(0)
        key, isolation = "", {}
        if source.suffix == ".safetensors" or head.endswith(b"{"):
            raw = file
        else:
            key, isolation = in_own_process(file, raw, limits)
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


def printable(text: str) -> str:
    """One line without control characters and direction marks, however hostile the names in it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def short(text: object) -> str:
    """What a file says, quoted and not too long."""
    text = str(text)
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def too_much(what: str, found: int, most: int, option: str) -> UserError:
    return UserError(
        f"holds {found:,} {what}, the limit is {most:,}; raise {option} if you expect that"
    )


# safetensors: a length, a header in JSON, bytes. Nothing in it can run, but all of it can lie.


def unsound(why: str) -> UserError:
    return UserError(f"is no sound safetensors file: {why}")


def read_header(file: BinaryIO, limits: Limits) -> dict[str, Entry]:
    """The tensors of a safetensors file.

    Raises: UserError unless the header is sound and its tensors fill the file exactly, side by
    side.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if size < 8:
        raise unsound(f"it has {size} bytes")
    length = struct.unpack("<Q", file.read(8))[0]
    most = min(HEADER, size - 8)
    if length > most:
        raise unsound(f"its header claims {length:,} bytes, of at most {most:,}")
    try:
        described = json.loads(file.read(length).decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise unsound("its header is no JSON") from None
    if not isinstance(described, dict):
        raise unsound("its header is no JSON object")
    meta = described.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):
        raise unsound("its metadata are not text")
    if len(described) > limits.tensors:
        raise too_much("tensors", len(described), limits.tensors, "tensors")
    entries = {name: entry(name, what, 8 + length, limits) for name, what in described.items()}
    if not entries:
        raise UserError("holds no tensors")
    elements = sum(math.prod(entry.shape) for entry in entries.values())
    if elements > limits.elements:
        raise too_much("values", elements, limits.elements, "elements")
    at = 8 + length
    for name, found in sorted(entries.items(), key=lambda item: item[1][2:]):
        if found.start != at:
            raise unsound(f"{short(name)} overlaps another tensor, or leaves a gap")
        at = found.end
    if at != size:
        raise unsound(f"its tensors end at byte {at:,}, the file at {size:,}")
    return entries


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    twice = [
        name for name, count in collections.Counter(name for name, _ in pairs).items() if count > 1
    ]
    if twice:
        raise unsound(f"its header has {short(twice[0])} twice")
    return dict(pairs)


def entry(name: str, what: object, offset: int, limits: Limits) -> Entry:
    """One tensor's description, checked by itself; the data begin at `offset`."""
    if not NAME.fullmatch(name):
        raise UserError(f"has a tensor with a name that no layer has: {short(name)}")
    if not isinstance(what, dict) or what.keys() != {"dtype", "shape", "data_offsets"}:
        raise unsound(f"{short(name)} lacks a dtype, shape or offsets")
    dtype, shape, offsets = what["dtype"], what["shape"], what["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"has {short(name)} of dtype {short(dtype)}; known are {', '.join(DTYPES)}")
    if not counts(shape) or len(shape) > 8 or any(side > limits.elements for side in shape):
        raise UserError(
            f"has {short(name)} of shape {short(shape)}; up to 8 sides from 0 to"
            f" {limits.elements:,} make sense"
        )
    if (
        not counts(offsets)
        or len(offsets) != 2
        or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].bytes
    ):
        raise unsound(f"{short(name)}, {dtype} {shape}, cannot lie at bytes {short(offsets)}")
    return Entry(dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


def counts(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


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
                        f"has NaN or infinite values in {short(name)}; no network works with them"
                    )
                out.write(chunk)


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


# Everything else is read in a process of its own, whose word is not trusted: what it writes goes
# through `read_header`.


def in_own_process(file: BinaryIO, raw: BinaryIO, limits: Limits) -> tuple[str, dict[str, bool]]:
    """Have a checkpoint written to `raw` as safetensors; the key of its state dict, and the
    isolation that was granted.

    The process gets the two open files, which nobody can exchange, and little of the environment,
    where tokens often lie.

    Raises: UserError when it refuses, dies, or takes too long.
    """
    env = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    env |= {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    command = [sys.executable, "-P", "-m", "rnp.quarantine", json.dumps(asdict(limits))]
    too_long = UserError(
        f"took more than {limits.seconds} s to read; raise seconds if the machine is slow"
    )
    with tempfile.TemporaryFile() as report:
        try:
            done = subprocess.run(
                command,
                stdin=file,
                stdout=raw,
                stderr=report,
                env=env,
                timeout=limits.seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise too_long from None
        if done.returncode == -getattr(signal, "SIGXCPU", math.inf):
            raise too_long
        report.seek(0)
        text = report.read(MIB).decode(errors="replace")
    try:
        said = json.loads(text)
        if "refused" not in said and said["key"] not in ("", *KEYS):
            raise ValueError("no key of ours")
    except (ValueError, TypeError, KeyError):
        last = (text.strip().splitlines() or ["without a word"])[-1]
        raise UserError(
            f"stopped the process that read it (exit code {done.returncode}, {short(last)}); it is"
            " hostile or damaged, or the machine lacks memory"
        ) from None
    if "refused" in said:
        raise UserError(str(said["refused"]))
    return said["key"], said["isolation"]


def main() -> None:
    """Standard input is the checkpoint, standard output takes safetensors, standard error the
    report.
    """
    limits = Limits(**json.loads(sys.argv[1]))
    warnings.simplefilter("ignore")
    with os.fdopen(os.dup(1), "wb") as raw, os.fdopen(os.dup(2), "w") as report:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        isolation = isolate(limits)
        try:
            check(sys.stdin.buffer)
            limit("RLIMIT_AS", sys.maxsize, final=False)
            import torch  # noqa: F401  what it takes is not the file's fault

            limit_memory(2 * os.fstat(0).st_size + limits.memory * MIB)
            key = extract(sys.stdin.buffer, raw, limits)
            raw.flush()
            said = {"key": key, "isolation": isolation}
        except UserError as error:
            said = {"refused": str(error)}
        except OSError as error:
            said = {
                "refused": f"cannot be read, or its copy not written: {error.strerror or error}"
            }
        except Exception as error:
            said = {"refused": reason(error, limits)}
        json.dump(said, report)


def reason(error: Exception, limits: Limits) -> str:
    """Why Python or torch gave up, without torch's advice to trust the file."""
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return (
            f"needs more memory than twice its size and {limits.memory} MiB; raise memory if you"
            " expect that"
        )
    if "Weights only load failed" in text:
        detail = (
            text.rpartition("\n\nCheck the documentation")[0].rpartition("\n")[2].partition(". ")[0]
        )
        return f"is refused by torch's restricted unpickler ({short(detail)}); {EXPORT}"
    return (
        f"is damaged, or was not written by torch.save ({type(error).__name__}:"
        f" {short(text.partition(chr(10))[0])})"
    )


def isolate(limits: Limits) -> dict[str, bool]:
    """Give up, for good, what reading weights does not need: each measure, and whether the system
    granted it.

    Memory is limited as soon as torch is loaded, and provisionally until then.
    """
    limit("RLIMIT_CORE", 0)
    return {
        "network": leave_network(),
        "memory": limit_memory(limits.memory * MIB, final=False),
        # SIGXCPU at the soft limit says what happened, SIGKILL at the hard one is for who ignores
        # it
        "processor time": (
            limit("RLIMIT_CPU", limits.seconds + 1)
            and limit("RLIMIT_CPU", limits.seconds, final=False)
        ),
        "file size": limit("RLIMIT_FSIZE", limits.file_size * MIB),
        "open files": limit("RLIMIT_NOFILE", OPEN_FILES),
    }


def leave_network() -> bool:
    """Move into user and network namespaces of one's own, where there is no device; Linux, where
    it is allowed.
    """
    new_user, new_network = 0x10000000, 0x40000000  # sched.h
    unshare = getattr(ctypes.CDLL(None), "unshare", None) if sys.platform == "linux" else None
    return unshare is not None and unshare(new_user | new_network) == 0


def limit(name: str, value: int, *, final: bool = True) -> bool:
    try:
        import resource

        kind = getattr(resource, name)
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value if final else most))
    except (ImportError, AttributeError, ValueError, OSError):  # Windows has none, macOS not all
        return False
    return True


def limit_memory(more: int, *, final: bool = True) -> bool:
    """Allow `more` bytes of address space than are in use."""
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return False
    return limit("RLIMIT_AS", used + more, final=final)


def check(file: BinaryIO) -> None:
    """Look at a checkpoint from outside, which takes no torch and refuses most hostile files.

    Raises: UserError naming what is wrong; whatever zipfile and pickletools raise on damaged files.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(4) == b"PK\x03\x04":  # torch's rule
        check_archive(zipfile.ZipFile(file), size)
    else:
        check_legacy(file)


def extract(file: BinaryIO, raw: BinaryIO, limits: Limits) -> str:
    """Write the state dict of a checkpoint to `raw` as safetensors; returns the key under which it
    was found.

    Raises: UserError when there is none or it is too large; whatever torch raises on what it does
    not read.
    """
    import torch

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    key, state = find_state(torch.load(file, map_location="cpu", weights_only=True))
    codes = {getattr(torch, dtype.torch): code for code, dtype in DTYPES.items()}
    for name, tensor in state.items():
        if (
            tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.dtype not in codes
        ):
            raise UserError(
                f"has {short(name)} as {tensor.dtype}, {tensor.layout}, on {tensor.device}; dense"
                f" tensors of the usual types alone can be read; {EXPORT}"
            )
    if (
        sum(
            {
                s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in state.values())
            }.values()
        )
        > size
    ):
        raise UserError("claims tensors that are larger than the file")
    elements = sum(tensor.numel() for tensor in state.values())
    if elements > limits.elements:  # before an expanded tensor is written out
        raise too_much("values", elements, limits.elements, "elements")
    raw.write(
        make_header(
            [(name, codes[tensor.dtype], tensor.shape) for name, tensor in state.items()], {}
        )
    )
    for tensor in state.values():
        raw.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return key


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Judge a zip archive by its directory and checksums, and its pickle by the globals that it
    names.

    Raises: UserError unless torch.save can have written it.
    """
    records = archive.infolist()
    roots = {name.partition("/")[0] for name in archive.namelist()}
    names = {name.partition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names or any(name.startswith("code/") for name in names):
        raise UserError(f"is a TorchScript archive, which is a program; {EXPORT}")
    if {"archive_format", "serialized_exported_program.json"} & (names | roots):
        raise UserError(f"is an archive of torch.export (.pt2), which is a program; {EXPORT}")
    if "data.pkl" not in names:
        raise UserError("is a zip archive that torch.save did not write: it has no data.pkl")
    if len(roots) > 1 or len({name.lower() for name in names}) < len(records):
        raise UserError(
            "is a zip archive that torch.save did not write: it has a record twice, or several"
            " folders"
        )
    packed = [
        r
        for r in records
        if r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size
    ]
    if packed:
        raise UserError(
            f"is a zip archive that torch.save did not write: {short(packed[0].filename)} is"
            f" compressed, from {packed[0].file_size:,} bytes"
        )
    claimed = sum(record.file_size for record in records)
    if claimed > size:
        raise UserError(
            f"is a zip archive with a false directory: it claims {claimed:,} bytes, the file has"
            f" {size:,}"
        )
    with archive.open(f"{min(roots)}/data.pkl") as stream:
        check_pickle(stream)
    damaged = archive.testzip()
    if damaged:
        raise UserError(
            f"is damaged: the checksum of {short(damaged)} is wrong; copy or download it again"
        )


def check_legacy(file: BinaryIO) -> None:
    """Check the pickles of a file that torch.save wrote before it wrote zip archives; the raw
    storages follow them.

    Raises: UserError when it is another kind of file.
    """
    file.seek(257)
    if file.read(5) == b"ustar":
        raise UserError(
            "is a tar archive, as torch's first versions wrote; its restricted unpickler reads"
            f" none; {EXPORT}"
        )
    file.seek(0)
    start = file.read(len(MAGIC))
    file.seek(0)
    try:
        for part in range(5):  # magic number, version, system, content, keys of the storages
            check_pickle(file)
            if part == 0 and start != MAGIC:
                raise UserError(f"is a pickle that torch.save did not write; {EXPORT}")
    except ValueError:
        raise UserError(
            "is neither safetensors nor a checkpoint of torch.save, or it is damaged"
        ) from None


def check_pickle(stream: io.BufferedIOBase) -> None:
    """Read the operations of one pickle without carrying them out.

    Raises: UserError naming the first global that weights do not need, or the protocol; ValueError
    when it is no pickle.
    """
    protocol, memo = 0, {}
    strings = collections.deque(["?", "?"], maxlen=2)  # what protocol 4 takes for module and name
    for operation, value, _ in pickletools.genops(stream):
        code = operation.name
        if code == "PROTO":
            protocol = value
        elif code in ("GLOBAL", "INST"):
            admit(value.replace(" ", "."))
        elif code == "STACK_GLOBAL":
            admit(".".join(strings))
        elif code.startswith("EXT"):
            admit(f"copyreg extension {value}")
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


def admit(name: str) -> None:
    if name not in ALLOWED:
        raise UserError(
            f"asks for {short(name)}, which weights do not need, and is refused; {EXPORT}"
        )


def find_state(content: object) -> tuple[str, dict]:
    """The key ("" for none) and the dictionary of tensors.

    Raises: UserError when there is none.
    """
    import torch

    places = {"": content}
    if isinstance(content, dict):
        places |= {key: content[key] for key in KEYS if key in content}
    for key, state in places.items():
        if (
            isinstance(state, dict)
            and state
            and all(
                type(name) is str and type(value) in (torch.Tensor, torch.nn.Parameter)
                for name, value in state.items()
            )
        ):
            return key, state
    raise UserError(
        "holds no weights: a dictionary of named tensors and nothing else must be all of the file,"
        f" or lie under {', '.join(KEYS)}; {EXPORT}"
    )


if __name__ == "__main__":
    main()
