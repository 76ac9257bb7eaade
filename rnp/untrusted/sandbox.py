"""Read a pickled checkpoint in a process of its own, whose output is checked like any file.

This file is also the program of that process: `python -m rnp.untrusted.sandbox`.
"""

# PyTorch and NumPy are imported where they are used: most hostile files are refused before the
# process has loaded either of them. Nothing that this file imports may import them.
from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from rnp.errors import UserError
from rnp.untrusted.limits import MIB, Limits, over_limit, quote
from rnp.untrusted.pickle_scan import EXPORT, check
from rnp.untrusted.safetensors_header import DTYPES, make_header

if TYPE_CHECKING:
    from torch import Tensor

OPEN_FILES = 64
ENVIRONMENT = ("PATH", "HOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR")
"""The variables that Python and PyTorch need to start; others may hold secrets."""
KEYS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")
"""Where a checkpoint may hold the weights."""


# The calling process


def run_sandboxed(file: BinaryIO, raw: BinaryIO, limits: Limits) -> tuple[str, dict[str, bool]]:
    """Let the child process write the weights in `file` to `raw`, as safetensors.

    Returns the key under which the weights were found, and which measures of isolation the system
    granted. The child gets the two open files, so that nobody can exchange them, and its report
    is not trusted.

    Raises: UserError when the child refuses the file, dies, or takes too long.
    """
    command = [sys.executable, "-P", "-m", "rnp.untrusted.sandbox", json.dumps(asdict(limits))]
    too_long = UserError(
        f"took more than {limits.seconds} s to read; raise seconds if the machine is slow"
    )
    with tempfile.TemporaryFile() as report:
        try:
            child = subprocess.run(
                command,
                stdin=file,
                stdout=raw,
                stderr=report,
                env=child_environment(),
                timeout=limits.seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise too_long from None
        if child.returncode == -getattr(signal, "SIGXCPU", math.inf):
            raise too_long
        report.seek(0)
        text = report.read(MIB).decode(errors="replace")
    return parse_report(text, child.returncode)


def child_environment() -> dict[str, str]:
    """A few variables, and a search path that begins with the folder of the package `rnp`."""
    inherited = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return inherited | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }


def parse_report(text: str, exit_code: int) -> tuple[str, dict[str, bool]]:
    """The key and the isolation in the child's report.

    Raises: UserError with the child's reason to refuse the file, or when this is no report.
    """
    try:
        report = json.loads(text)
        if "refused" not in report and report["key"] not in ("", *KEYS):
            raise ValueError("a key that no checkpoint has")
    except (ValueError, TypeError, KeyError):
        last_line = (text.strip().splitlines() or ["without a word"])[-1]
        raise UserError(
            f"stopped the process that read it (exit code {exit_code}, {quote(last_line)}); it is"
            " hostile or damaged, or the machine lacks memory"
        ) from None
    if "refused" in report:
        raise UserError(str(report["refused"]))
    return report["key"], report["isolation"]


# The child process


def main() -> None:
    """Read the checkpoint on standard input.

    Writes safetensors to standard output, and a report as JSON to standard error.
    """
    limits = Limits(**json.loads(sys.argv[1]))
    warnings.simplefilter("ignore")
    with os.fdopen(os.dup(1), "wb") as raw, os.fdopen(os.dup(2), "w") as report:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        json.dump(read_isolated(sys.stdin.buffer, raw, limits), report)


def read_isolated(file: BinaryIO, raw: BinaryIO, limits: Limits) -> dict[str, object]:
    """Isolate this process, then write the weights in `file` to `raw`; returns the report."""
    isolation = isolate(limits)
    try:
        check(file)
        limit("RLIMIT_AS", sys.maxsize, final=False)
        import torch  # noqa: F401  before the limit: its memory does not count as the file's

        limit_memory(2 * os.fstat(0).st_size + limits.memory * MIB)
        key = extract(file, raw, limits)
        raw.flush()
        return {"key": key, "isolation": isolation}
    except UserError as error:
        return {"refused": str(error)}
    except OSError as error:
        reason = error.strerror or error
        return {"refused": f"cannot be read, or its copy not written: {reason}"}
    except Exception as error:
        return {"refused": explain(error, limits)}


def explain(error: Exception, limits: Limits) -> str:
    """Why Python or PyTorch could not read the file, without PyTorch's advice to trust it."""
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return (
            f"needs more memory than twice its size and {limits.memory} MiB; raise memory if you"
            " expect that"
        )
    if "Weights only load failed" in text:
        advice = "\n\nCheck the documentation"
        detail = text.rpartition(advice)[0].rpartition("\n")[2].partition(". ")[0]
        return f"is refused by torch's restricted unpickler ({quote(detail)}); {EXPORT}"
    first_line = text.partition("\n")[0]
    return (
        f"is damaged, or was not written by torch.save ({type(error).__name__}:"
        f" {quote(first_line)})"
    )


def isolate(limits: Limits) -> dict[str, bool]:
    """Give up for good what reading weights does not need.

    Returns each measure and whether the system granted it. The limit on memory is provisional
    until PyTorch is loaded.
    """
    limit("RLIMIT_CORE", 0)
    return {
        "network": leave_network(),
        "memory": limit_memory(limits.memory * MIB, final=False),
        # The soft limit sends SIGXCPU, which the caller recognizes; the hard one, a second later,
        # sends SIGKILL, which cannot be ignored.
        "processor time": (
            limit("RLIMIT_CPU", limits.seconds + 1)
            and limit("RLIMIT_CPU", limits.seconds, final=False)
        ),
        "file size": limit("RLIMIT_FSIZE", limits.file_size * MIB),
        "open files": limit("RLIMIT_NOFILE", OPEN_FILES),
    }


def leave_network() -> bool:
    """Move to new user and network namespaces, which have no device; on Linux, where allowed."""
    if sys.platform != "linux":
        return False
    unshare = getattr(ctypes.CDLL(None), "unshare", None)
    new_user = 0x10000000  # sched.h
    new_network = 0x40000000
    return unshare is not None and unshare(new_user | new_network) == 0


def limit(name: str, value: int, *, final: bool = True) -> bool:
    """Lower a limit of this process, for good if `final`; whether the system has it."""
    try:
        import resource

        kind = getattr(resource, name)
        _, highest = resource.getrlimit(kind)
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        resource.setrlimit(kind, (value, value if final else highest))
    except (ImportError, AttributeError, ValueError, OSError):  # Windows has none, macOS not all
        return False
    return True


def limit_memory(more: int, *, final: bool = True) -> bool:
    """Allow `more` bytes of address space than this process uses now."""
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return False
    return limit("RLIMIT_AS", used + more, final=final)


def extract(file: BinaryIO, raw: BinaryIO, limits: Limits) -> str:
    """Write the weights of a checkpoint to `raw` as safetensors; returns the key of the weights.

    Raises: UserError when there are none or too many; whatever PyTorch raises for a file that it
    does not read.
    """
    import torch

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    key, state = find_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    codes = {getattr(torch, dtype.torch): code for code, dtype in DTYPES.items()}
    require_dense(state, set(codes))
    storages = [tensor.untyped_storage() for tensor in state.values()]
    if sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()) > size:
        raise UserError("claims tensors that are larger than the file")
    elements = sum(tensor.numel() for tensor in state.values())
    if elements > limits.elements:  # an expanded tensor is small until it is written
        raise over_limit("values", elements, limits.elements, "elements")
    described = [(name, codes[tensor.dtype], tensor.shape) for name, tensor in state.items()]
    raw.write(make_header(described, {}))
    for tensor in state.values():
        raw.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return key


def require_dense(state: dict[str, Tensor], dtypes: set[object]) -> None:
    """Raises: UserError unless all tensors are dense, on the CPU, and of one of `dtypes`."""
    import torch

    for name, tensor in state.items():
        if (
            tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.dtype not in dtypes
        ):
            raise UserError(
                f"has {quote(name)} as {tensor.dtype}, {tensor.layout}, on {tensor.device}; dense"
                f" tensors of the usual types alone can be read; {EXPORT}"
            )


def find_state_dict(content: Any) -> tuple[str, dict[str, Tensor]]:
    """The key ("" for none) and the dictionary of the weights.

    Raises: UserError when there is none.
    """
    candidates = {"": content}
    if isinstance(content, dict):
        candidates |= {key: content[key] for key in KEYS if key in content}
    for key, state in candidates.items():
        if is_state_dict(state):
            return key, state
    raise UserError(
        "holds no weights: a dictionary of named tensors and nothing else must be all of the file,"
        f" or lie under {', '.join(KEYS)}; {EXPORT}"
    )


def is_state_dict(state: Any) -> bool:
    import torch

    return (
        isinstance(state, dict)
        and bool(state)
        and all(
            type(name) is str and type(value) in (torch.Tensor, torch.nn.Parameter)
            for name, value in state.items()
        )
    )


if __name__ == "__main__":
    main()
