"""Read a pickle in a process of its own, whose word is not trusted."""

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
from typing import BinaryIO

from rnp.errors import UserError
from rnp.untrusted.limits import MIB, Limits, over_limit, quote
from rnp.untrusted.pickle_scan import EXPORT, check
from rnp.untrusted.safetensors_header import DTYPES, make_header

OPEN_FILES = 64
ENVIRONMENT = (
    "PATH",
    "HOME",
    "LD_LIBRARY_PATH",
    "SYSTEMROOT",
    "TMPDIR",
)  # what Python and torch need to start
KEYS = ("state_dict", "model_state_dict", "model", "net", "weights", "params")


# Everything else is read in a process of its own, whose word is not trusted: what it writes goes
# through `read_header`.


def run_sandboxed(file: BinaryIO, raw: BinaryIO, limits: Limits) -> tuple[str, dict[str, bool]]:
    """Have a checkpoint written to `raw` as safetensors; the key of its state dict, and the
    isolation that was granted.

    The process gets the two open files, which nobody can exchange, and little of the environment,
    where tokens often lie.

    Raises: UserError when it refuses, dies, or takes too long.
    """
    env = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    env |= {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    command = [sys.executable, "-P", "-m", "rnp.untrusted.sandbox", json.dumps(asdict(limits))]
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
            f"stopped the process that read it (exit code {done.returncode}, {quote(last)}); it is"
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
        return f"is refused by torch's restricted unpickler ({quote(detail)}); {EXPORT}"
    return (
        f"is damaged, or was not written by torch.save ({type(error).__name__}:"
        f" {quote(text.partition(chr(10))[0])})"
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


def extract(file: BinaryIO, raw: BinaryIO, limits: Limits) -> str:
    """Write the state dict of a checkpoint to `raw` as safetensors; returns the key under which it
    was found.

    Raises: UserError when there is none or it is too large; whatever torch raises on what it does
    not read.
    """
    import torch

    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    key, state = find_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    codes = {getattr(torch, dtype.torch): code for code, dtype in DTYPES.items()}
    for name, tensor in state.items():
        if (
            tensor.layout is not torch.strided
            or tensor.device.type != "cpu"
            or tensor.dtype not in codes
        ):
            raise UserError(
                f"has {quote(name)} as {tensor.dtype}, {tensor.layout}, on {tensor.device}; dense"
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
        raise over_limit("values", elements, limits.elements, "elements")
    raw.write(
        make_header(
            [(name, codes[tensor.dtype], tensor.shape) for name, tensor in state.items()], {}
        )
    )
    for tensor in state.values():
        raw.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return key


def find_state_dict(content: object) -> tuple[str, dict]:
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
