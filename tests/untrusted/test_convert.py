"""Hostile and broken files end in one line and exit code 2 and run nothing; good ones come out
exactly.
"""

import collections
import io
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rnp.cli.convert import describe
from rnp.cli.main import cli, guard
from rnp.errors import UserError
from rnp.io.files import sha256
from rnp.io.tensors import load_tensors
from rnp.untrusted.convert import common_prefix, convert
from rnp.untrusted.limits import MIB, Limits
from rnp.untrusted.pickle_scan import check
from rnp.untrusted.safetensors_header import DTYPES, read_header
from rnp.untrusted.sandbox import explain, extract, isolate

resource = pytest.importorskip("resource")
WEIGHTS = {"conv.weight": torch.arange(6.0).reshape(1, 2, 3), "bn.steps": torch.tensor(7)}
EXPORT = "safetensors.torch.save_file(model.state_dict()"


class Call:
    """Unpickled freely, it calls `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# Makers of hostile and broken checkpoints: each writes to `path`; `touch` is a shell command that
# touches the canary.


def pickled(protocol, wrap=lambda payload: payload, function=os.system):
    return lambda path, touch: path.write_bytes(
        pickle.dumps(wrap(Call(function, touch)), protocol=protocol)
    )


def saved(wrap, **settings):
    return lambda path, touch: torch.save(wrap(touch), path, **settings)


def gadget(touch):
    return {
        "state_dict": {
            **WEIGHTS,
            "x": Call(torch.storage._load_from_bytes, pickle.dumps(Call(os.system, touch))),
        }
    }


def tarred(path, touch):
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Call(os.system, touch), protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def zipped(records, compression=zipfile.ZIP_STORED):
    def make(path, touch):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in records.items():
                archive.writestr(name, content)

    return make


def false_directory(path, touch):
    """Many names for the same bytes, which together claim far more than the file holds."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/data/0", bytes(MIB))
        for number in range(1, 100):
            benign = zipfile.ZipInfo(f"archive/data/{number}")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(benign, field, getattr(archive.infolist()[1], field))
            archive.filelist.append(benign)


def jit(path, touch):
    torch.jit.ScriptModule().save(str(path))


def changed(change, **settings):
    """A good checkpoint whose bytes are then changed."""

    def make(path, touch):
        torch.save({"weight": torch.arange(70_000.0)}, path, **settings)
        path.write_bytes(change(path.read_bytes()))

    return make


def flip(content):
    middle = len(content) // 2  # in the one tensor
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


PT2 = {"m/archive_format": "pt2", "m/models/model.json": "{}", "m/data/weights/weight_0": bytes(8)}
LEGACY = {"_use_new_zipfile_serialization": False}
REFUSED = {  # file name: maker, words of the message
    "protocol0.pt": (pickled(0), "asks for 'posix.system'"),
    "protocol2.pth": (pickled(2), "asks for 'posix.system'"),
    "protocol4.ckpt": (pickled(4), "asks for 'posix.system'"),
    "protocol5.bin": (pickled(5), "asks for 'posix.system'"),
    "no_suffix": (pickled(2), "asks for 'posix.system'"),
    "nested.pt": (
        pickled(4, lambda payload: {"state_dict": {"a": [{"b": (payload,)}]}}),
        "asks for 'posix.system'",
    ),
    "subprocess.pt": (pickled(4, function=subprocess.getoutput), "asks for 'subprocess.getoutput'"),
    "eval.pt": (
        saved(lambda touch: Call(eval, f"__import__('os').system({touch!r})"), **LEGACY),
        "asks for '__builtin__.eval'",
    ),
    "repeated.pt": (
        pickled(4, lambda payload: [collections.OrderedDict, collections.deque, payload]),
        "asks for 'collections.deque'",
    ),
    "in_zip.pth": (
        saved(lambda touch: {**WEIGHTS, "x": Call(os.system, touch)}),
        "asks for 'posix.system'",
    ),
    "in_zip4.pth": (
        saved(lambda touch: Call(exec, "x"), pickle_protocol=4),
        "asks for 'builtins.exec'",
    ),
    "gadget.pth": (saved(gadget), "asks for 'torch.storage._load_from_bytes'"),
    "in_tar.tar": (tarred, "is a tar archive"),
    "whole_module.pth": (
        saved(lambda touch: nn.Linear(2, 2)),
        "asks for 'torch.nn.modules.linear.Linear'",
    ),
    "whole_module_legacy.pth": (
        saved(lambda touch: nn.Linear(2, 2), **LEGACY),
        "asks for 'torch.nn.modules.linear.Linear'",
    ),
    "torchscript.pt": (jit, "is a TorchScript archive"),
    "exported.pt2": (zipped(PT2), "is an archive of torch.export"),
    "protocol4_weights.pt": (
        saved(lambda touch: WEIGHTS, pickle_protocol=4),
        "is a pickle of protocol 4",
    ),
    "plain.pt": (
        lambda path, touch: path.write_bytes(pickle.dumps({}, 2)),
        "is a pickle that torch.save did not write",
    ),
    "bomb.pth": (
        zipped({"a/data.pkl": b"", "a/data/0": bytes(64 * MIB)}, zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "false_directory.pth": (false_directory, "with a false directory"),
    "twice.pth": (zipped({"a/data.pkl": "", "a/DATA.pkl": ""}), "has a record twice"),
    "zip.pth": (zipped({"a/readme": "hello"}), "has no data.pkl"),
    "two_folders.pth": (zipped({"a/data.pkl": "", "b/data/0": ""}), "or several folders"),
    "truncated.pth": (changed(lambda content: content[:-30]), "is damaged"),
    "flipped.pth": (changed(flip), "the checksum of"),
    "pointer.pth": (
        lambda path, touch: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is neither safe",
    ),
    "random.pth": (
        lambda path, touch: path.write_bytes(b"\xff" + os.urandom(4000)),
        "is neither safetensors nor",
    ),
    "escape.pth": (
        lambda path, touch: path.write_bytes(b"c\x1b[31mos\nsys\x07tem\n."),
        r"asks for '\x1b[31mos.sys\x07tem'",
    ),
    "empty.pth": (lambda path, touch: path.touch(), "is empty"),
}


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """`refused(path)` converts by command, which must fail as every refusal does; gives the
    message.
    """
    out = tmp_path / "out"
    out.mkdir()

    def run(path: Path) -> str:
        before, peaks = peak_memory("self"), [0]
        monkeypatch.setattr(subprocess, "run", watched(peaks))
        with pytest.raises(SystemExit) as end, guard():
            cli(["convert", str(path), "-o", str(out / "model.safetensors")], standalone_mode=False)
        said = capsys.readouterr()
        assert (end.value.code, said.out, list(out.iterdir())) == (2, "", [])
        line, rest = said.err.split("\n", 1)
        assert rest == "" and line.isprintable() and line.startswith(f"error: {path} ")
        assert peak_memory("self") < before + 64 * MIB and max(peaks) < 1024 * MIB, (
            "torch alone takes half of it"
        )
        return line

    return run


def peak_memory(process: int | str) -> int:
    """Bytes that a process held at most since it began; 0 where the system does not tell, or when
    it has ended.
    """
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def watched(peaks):
    """`subprocess.run` that adds to `peaks` what the process holds, again and again."""

    def run(command, *, timeout, check, **streams):
        with subprocess.Popen(command, **streams) as process:
            end = time.monotonic() + timeout
            while process.poll() is None:
                peaks.append(peak_memory(process.pid))
                if time.monotonic() > end:
                    process.kill()
                    raise subprocess.TimeoutExpired(command, timeout)
                time.sleep(0.002)
        return subprocess.CompletedProcess(command, process.returncode)

    return run


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*TypedStorage is deprecated"
)
@pytest.mark.parametrize("name", REFUSED)
def test_hostile_checkpoint(tmp_path, refused, name):
    make, words = REFUSED[name]
    canary, path = tmp_path / "canary", tmp_path / name
    make(path, f"touch {canary}")
    message = refused(path)
    assert words in message
    assert (EXPORT in message) == words.startswith(("asks for", "is a ", "is an ")), (
        "advice, unless it is damaged"
    )
    assert not canary.exists()


def test_the_canary_would_have_been_touched(tmp_path):
    pickle.loads(pickle.dumps(Call(os.system, f"touch {tmp_path / 'canary'}")))
    assert (tmp_path / "canary").exists()


# What gets past the look from outside is refused by torch, or by what is found. The process is left
# out here, for speed.


@pytest.fixture
def here(monkeypatch):
    """Checkpoints are read in this process, without its limits."""

    def read(file, raw, limits):
        try:
            check(file)
            return extract(file, raw, limits), {"own process": False}
        except (RuntimeError, pickle.UnpicklingError) as error:
            raise UserError(explain(error, limits)) from None

    monkeypatch.setattr("rnp.untrusted.convert.run_sandboxed", read)


def unread(content):
    """No storage is listed as following, so torch fills the tensor with whatever lies in memory."""
    return content.partition(b"\x80\x02]")[0] + b"\x80\x02]."


INSIDE = {
    "opcode.pth": (
        zipped({"a/data.pkl": b"\x80\x02}0}.", "a/version": "3", "a/byteorder": "little"}),
        "refused by torch's restricted unpickler ('Unsupported operand 48')",
    ),
    "nothing.pth": (saved(lambda touch: {}), "holds no weights"),
    "list.pth": (saved(lambda touch: [torch.ones(2)]), "holds no weights"),
    "mixed.pth": (saved(lambda touch: {"state_dict": {**WEIGHTS, "epoch": 3}}), "holds no weights"),
    "numbered.pth": (saved(lambda touch: {0: torch.ones(2)}), "holds no weights"),
    "nan.pth": (
        saved(lambda touch: {"a": torch.ones(9), "b": torch.tensor([1, float("nan")])}),
        "infinite values in 'b'",
    ),
    "inf.pth": (
        saved(lambda touch: {"a": torch.tensor([1, float("-inf")]).half()}),
        "infinite values in 'a'",
    ),
    "complex.pth": (
        saved(lambda touch: {"a": torch.ones(2, dtype=torch.complex64)}),
        "for 'torch.ComplexFloatStorage'",
    ),
    "meta.pth": (
        saved(lambda touch: {"a": torch.ones(2, device="meta")}),
        "_rebuild_meta_tensor_no_storage', which",
    ),
    "expanded.pth": (
        saved(lambda touch: {"a": torch.zeros(1).expand(2**20, 2**20)}),
        "holds 1,099,511,627,776 values",
    ),
    "unread.pth": (changed(unread, **LEGACY), "claims tensors that are larger than the file"),
    "cut.pth": (
        changed(lambda content: content[:-30], **LEGACY),
        "is damaged, or was not written by torch.save",
    ),
    "html.pth": (
        saved(lambda touch: {"<script>alert(1)</script>": torch.ones(2)}),
        "a name that no layer has: '<script>",
    ),
    "escapes.pth": (
        saved(lambda touch: {"\x1b]0;owned\x07\n\u202e": torch.ones(2)}),
        r"'\x1b]0;owned\x07\n\u202e'",
    ),
    "metadata.pth": (
        saved(lambda touch: {"__metadata__": torch.ones(2)}),
        "its metadata are not text",
    ),
}


@pytest.mark.parametrize("name", INSIDE)
def test_checkpoint_without_weights(tmp_path, refused, here, name):
    make, words = INSIDE[name]
    make(tmp_path / name, "")
    assert words in refused(tmp_path / name)


# safetensors


def stored(header, data=b"", length=None):
    """The bytes of a safetensors file with this header, which may claim any length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start, end, *shape, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


ONE = tensor(0, 4, 1)
LYING = {  # what: bytes of the file, words of the message
    "four bytes": (b"\0\0\0\0", "it has 4 bytes"),
    "header longer than file": (
        stored({"a": ONE}, bytes(4), 10_000),
        "its header claims 10,000 bytes",
    ),
    "header of 2**63": (
        stored({"a": ONE}, bytes(4), 2**63),
        "its header claims 9,223,372,036,854,775,808 bytes",
    ),
    "large header": (
        stored(b"{" + b" " * 5 * MIB + b"}"),
        "its header claims 5,242,882 bytes, of at most 4,194,304",
    ),
    "no JSON": (stored(b"{hello}"), "its header is no JSON"),
    "no text": (stored(b"{\xff\xfe}"), "its header is no JSON"),
    "endless nesting": (stored(b'{"a":' * 200_000), "its header is no JSON"),
    "endless number": (stored(b'{"a": ' + b"9" * 9000 + b"}"), "its header is no JSON"),
    "list": (stored([1, 2]), "its header is no JSON object"),
    "no tensors": (stored({"__metadata__": {}}), "holds no tensors"),
    "metadata": (
        stored({"__metadata__": {"a": [1]}, "a": ONE}, bytes(4)),
        "its metadata are not text",
    ),
    "number for tensor": (stored({"a": 3}), "'a' lacks a dtype, shape or offsets"),
    "more about tensor": (
        stored({"a": {**ONE, "code": "x"}}, bytes(4)),
        "'a' lacks a dtype, shape or offsets",
    ),
    "unknown dtype": (stored({"a": tensor(0, 4, 1, dtype="X9")}, bytes(4)), "of dtype 'X9'"),
    "list for dtype": (stored({"a": tensor(0, 4, 1, dtype=[])}, bytes(4)), "of dtype '[]'"),
    "huge side": (stored({"a": tensor(0, 4, 2**40)}, bytes(4)), "of shape '[1099511627776]'"),
    "huge product": (
        stored({"a": tensor(0, 4, 2**16, 2**16, 2**16)}, bytes(4)),
        "cannot lie at bytes '[0, 4]'",
    ),
    "huge and empty": (
        stored({"a": tensor(0, 0, 0, 2**60)}),
        "of shape '[0, 1152921504606846976]'",
    ),
    "empty in file": (stored({"a": tensor(0, 4 * 10**10, 10**5, 10**5)}), "10,000,000,000 values"),
    "many sides": (stored({"a": tensor(0, 4, *[1] * 9)}, bytes(4)), "of shape '[1, 1, 1"),
    "offset for number": (
        stored({"a": {**ONE, "data_offsets": "04"}}, bytes(4)),
        "cannot lie at bytes '04'",
    ),
    "negative side": (stored({"a": tensor(0, 4, -1, -1)}, bytes(4)), "of shape '[-1, -1]'"),
    "fraction": (stored({"a": tensor(0, 4, 1.0)}, bytes(4)), "of shape '[1.0]'"),
    "true": (stored({"a": tensor(0, 4, True)}, bytes(4)), "of shape '[True]'"),
    "negative offsets": (
        stored({"a": tensor(-4, 0, 1)}, bytes(4)),
        "cannot lie at bytes '[-4, 0]'",
    ),
    "reversed offsets": (stored({"a": tensor(4, 0, 1)}, bytes(4)), "cannot lie at bytes '[4, 0]'"),
    "three offsets": (
        stored({"a": {**ONE, "data_offsets": [0, 4, 8]}}, bytes(4)),
        "cannot lie at bytes '[0, 4, 8]'",
    ),
    "overlapping": (
        stored({"a": tensor(0, 8, 2), "b": tensor(4, 12, 2)}, bytes(12)),
        "'b' overlaps another tensor",
    ),
    "gap": (
        stored({"a": ONE, "b": tensor(8, 12, 1)}, bytes(12)),
        "'b' overlaps another tensor, or leaves a gap",
    ),
    "truncated": (stored({"a": tensor(0, 40, 10)}, bytes(39)), "its tensors end at byte"),
    "more behind": (stored({"a": ONE}, bytes(4) + b"PK\x03\x04"), "its tensors end at byte"),
    "duplicate tensor": (
        stored(b'{"a": %s, "a": %s}' % ((json.dumps(ONE).encode(),) * 2), bytes(4)),
        "has 'a' twice",
    ),
    "duplicate shape": (
        stored(b'{"a": {"dtype": "F32", "shape": [1], "shape": [1]}}'),
        "has 'shape' twice",
    ),
    "nan F32": (stored({"a": ONE}, struct.pack("<f", float("nan"))), "infinite values in 'a'"),
    "inf F64": (
        stored({"a": tensor(0, 8, 1, dtype="F64")}, struct.pack("<d", float("inf"))),
        "infinite values in 'a'",
    ),
    "nan BF16": (
        stored({"a": tensor(0, 2, 1, dtype="BF16")}, b"\xc0\xff"),
        "infinite values in 'a'",
    ),
    "nan F8": (stored({"a": tensor(0, 1, 1, dtype="F8_E4M3")}, b"\xff"), "infinite values in 'a'"),
    "html name": (
        stored({"<img src=x onerror=alert(1)>": ONE}, bytes(4)),
        "a name that no layer has: '<img",
    ),
    "escape name": (
        stored({"a\x1b[2J\n": ONE}, bytes(4)),
        r"a name that no layer has: 'a\x1b[2J\n'",
    ),
    "no name": (stored({"": ONE}, bytes(4)), "a name that no layer has: ''"),
    "long name": (stored({"a" * 5000: ONE}, bytes(4)), "a name that no layer has: 'aaaa"),
}


@pytest.mark.parametrize("what", LYING)
def test_lying_safetensors(tmp_path, refused, what):
    content, words = LYING[what]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = refused(path)
    assert words in message and len(message) < 400 + len(str(path))


def test_any_flipped_bit_of_a_header_is_survived(tmp_path):
    whole = stored(
        {"a": tensor(0, 8, 2), "b": tensor(8, 10, 1, dtype="F16")},
        struct.pack("<ff", 1, 2) + b"\0\x3c",
    )
    path, survived = tmp_path / "a.safetensors", 0
    for bit in range(0, 8 * (len(whole) - 10), 3):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            survived += convert(path, tmp_path / "b.safetensors").elements == 3
        except UserError as error:
            assert str(error).isprintable()
    assert 0 < survived < 30, "a name may change, and little else"


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ],
)
def test_finite_values_alone_pass(tmp_path, dtype):
    """The largest number, and its successor in bits, which is infinity, or NaN where there is
    none.
    """
    kind = {1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    path = tmp_path / "a.safetensors"
    for value in (torch.finfo(dtype).max, torch.finfo(dtype).min):
        largest = torch.tensor([0, value], dtype=dtype)
        save_file({"a": largest}, path)
        convert(path, tmp_path / "b.safetensors")
        same(tmp_path / "b.safetensors", {"a": largest})
        bits = largest.view(kind).tolist()
        above = torch.tensor([bits[0], bits[1] + 1], dtype=kind).view(dtype)
        assert not above.float().isfinite().all()
        save_file({"a": above}, path)
        with pytest.raises(UserError, match="infinite values in 'a'"):
            convert(path, tmp_path / "b.safetensors")


# Limits and isolation


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"tensors": 1}, "holds 2 tensors, the limit is 1; raise tensors"),
        ({"elements": 6}, "holds 7 values"),
        ({"file_size": 1}, "holds 1,100,000 bytes, the limit is 1,048,576; raise file_size"),
    ],
)
def test_limits(tmp_path, option, words):
    path = tmp_path / "a.safetensors"
    save_file(WEIGHTS, path)
    if "file_size" in option:
        os.truncate(path, 1_100_000)
    with pytest.raises(UserError, match=words):
        convert(path, tmp_path / "b.safetensors", Limits(**option))


def test_limits_are_positive():
    with pytest.raises(UserError, match=r"limits\.seconds must be above 0, got 0"):
        Limits(seconds=0)


def test_memory_is_limited(tmp_path, refused):
    """A file of 280 kB claims eight GiB."""
    path = tmp_path / "claims.pth"
    changed(lambda content: content.replace(b"J\x70\x11\x01\x00", b"J\xff\xff\xff\x7f"), **LEGACY)(
        path, ""
    )
    assert "needs more memory than twice its size and 512 MiB" in refused(path)


def test_time_is_limited(tmp_path):
    torch.save(WEIGHTS, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + b"N0" * 20_000_000)
    with pytest.raises(UserError, match="took more than 1 s to read"):
        convert(tmp_path / "a.pth", tmp_path / "b.safetensors", Limits(seconds=1))


def test_processor_time_is_limited(tmp_path, monkeypatch):
    """Two threads use up a second in half of one."""
    torch.save(WEIGHTS, tmp_path / "a.pth")
    monkeypatch.setattr(
        sys,
        "executable",
        script(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGXCPU)"),
    )
    with pytest.raises(UserError, match="took more than 9 s to read"):
        convert(tmp_path / "a.pth", tmp_path / "b.safetensors", Limits(seconds=9))


def test_what_the_process_says_is_not_trusted(tmp_path, monkeypatch):
    torch.save(WEIGHTS, tmp_path / "a.pth")
    for said, words in (
        ("", "'without a word'"),
        ('{"key": "\\u001b"}', "exit code 0"),
        ("[1]", "exit code 0"),
        ("\x1b[2J", r"'\\x1b\[2J'"),
        ('{"refused": "\\u001b[2J"}', r"a.pth \\x1b\[2J"),
        ('{"key": "", "isolation": {}}', "it has 0 bytes"),
    ):
        program = f"import sys; sys.stderr.write({said!r})"
        monkeypatch.setattr(sys, "executable", script(tmp_path, program))
        with pytest.raises(UserError, match=words):
            convert(tmp_path / "a.pth", tmp_path / "b.safetensors")


def script(folder, program):
    path = folder / "python"
    path.write_text(f"#!{os.path.realpath(sys.base_exec_prefix)}/bin/python3\n{program}\n")
    path.chmod(0o755)
    return str(path)


def test_isolated_process_has_no_network_and_no_room():
    program = (
        "import json, resource, socket, sys\n"
        "from rnp.untrusted.limits import Limits\n"
        "from rnp.untrusted.sandbox import isolate\n"
        "granted = isolate(Limits(seconds=9))\n"
        "def tries(what):\n"
        "    try: what()\n"
        "    except (OSError, MemoryError): return False\n"
        "    return True\n"
        "port = int(sys.argv[1])\n"
        "reached = tries(lambda: socket.create_connection(('127.0.0.1', port), 5))\n"
        "large = tries(lambda: bytearray(600 * 2**20))\n"
        "print(json.dumps([granted, reached, large, resource.getrlimit(resource.RLIMIT_CPU)]))"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = subprocess.run(
            [sys.executable, "-c", program, str(server.getsockname()[1])],
            capture_output=True,
            check=True,
            cwd=Path(__file__).parents[2],
        )
    granted, reached, large, seconds = json.loads(done.stdout)
    assert reached != granted["network"] and large != granted["memory"]
    assert granted["processor time"] and seconds == [9, 10]
    assert granted["memory"] or sys.platform != "linux"


def test_a_system_without_limits_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(sys, "platform", "win32")
    isolation = isolate(Limits())
    assert set(isolation.values()) == {False}
    path = tmp_path / "a.safetensors"
    save_file(WEIGHTS, path)
    converted = convert(path, tmp_path / "b.safetensors")
    assert describe(converted, path, path)[-1] == "safetensors, read as data"
    object.__setattr__(converted, "isolation", isolation)
    *_, granted, lacking = describe(converted, path, path)
    assert granted.endswith("limits: none")
    assert (
        lacking
        == "not possible on this system: network, memory, processor time, file size, open files"
    )


# Good files


def same(path, expected):
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert (
            found[name].reshape(-1).view(torch.uint8).equal(value.reshape(-1).view(torch.uint8))
        ), name


ALL = {
    f"t.{dtype}": torch.arange(5).to(dtype)
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
} | {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}
NEW = {
    f"t.{dtype}": torch.ones(3).to(dtype)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64)
}


def test_a_checkpoint_by_command(tmp_path, capsys):
    """Through the process: half precision, nested, with two prefixes, beside what training
    leaves.
    """
    weights = {
        name: value.half() if value.is_floating_point() else value
        for name, value in WEIGHTS.items()
    }
    state = collections.OrderedDict(
        (f"module._orig_mod.{name}", value) for name, value in weights.items()
    )
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1).state_dict()
    scheduler = {"milestones": collections.Counter([3, 4])}
    source, out = tmp_path / "a.pth.tar", tmp_path / "new" / "b.safetensors"
    torch.save({"epoch": 3, "state_dict": state, "optimizer": optimizer, "lr": scheduler}, source)
    cli(["convert", str(source), "-o", str(out)], standalone_mode=False)
    first, *hashes, last = capsys.readouterr().out.splitlines()
    assert (
        first == f"{out}: 2 tensors, 7 values, found under 'state_dict', prefix 'module._orig_mod.'"
        " removed"
    )
    assert hashes[:2] == [f"sha256 {sha256(source)}  {source}", f"sha256 {sha256(out)}  {out}"]
    assert last.startswith(("read in a process of its own", "not possible on this system"))
    same(out, weights)
    assert load_tensors(out)[1] == {
        "kind": "weights",
        "key": "state_dict",
        "prefix": "module._orig_mod.",
        "source": sha256(source),
    }
    assert [p.name for p in out.parent.iterdir()] == ["b.safetensors"]


@pytest.mark.parametrize(
    ("content", "settings", "key"),
    [
        (ALL, {}, ""),
        (ALL, LEGACY, ""),
        (NEW, {}, ""),
        ({"net": ALL, "acc": 0.9}, {}, "net"),
        ({"model": NEW}, {}, "model"),
        ({"model_state_dict": ALL, "rng": torch.ones(5)}, LEGACY, "model_state_dict"),
    ],
)
def test_checkpoints_come_out_exactly(tmp_path, here, content, settings, key):
    torch.save(content, tmp_path / "a.pt", **settings)
    converted = convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    state = content[key] if key else content
    same(tmp_path / "b.safetensors", state)
    assert (converted.key, converted.prefix, converted.tensors) == (key, "", len(state))
    assert converted.elements == sum(value.numel() for value in state.values())
    assert converted.input_sha256 == sha256(tmp_path / "a.pt")
    assert converted.output_sha256 == sha256(tmp_path / "b.safetensors")


def test_views_parameters_and_shared_weights(tmp_path, here):
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "a": base.T,
        "b": base[1:, ::2],
        "c": base,
        "d": nn.Parameter(base),
        "e": torch.ones(1).expand(4),
    }
    torch.save(state, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    same(
        tmp_path / "b.safetensors",
        {name: value.detach().contiguous() for name, value in state.items()},
    )


def test_safetensors_come_out_exactly_whatever_their_order(tmp_path):
    named = {f"model.{name}": value for name, value in (ALL | NEW).items()}
    save_file(named, tmp_path / "a.safetensors", metadata={"x": "<b>\x1b"})
    converted = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (converted.prefix, converted.isolation) == ("model.", {})
    same(tmp_path / "b.safetensors", ALL | NEW)
    with (tmp_path / "b.safetensors").open("rb") as file:
        assert all(
            each.start % DTYPES[each.dtype].bytes == 0
            for each in read_header(file, Limits()).values()
        ), "aligned"
    content = (tmp_path / "a.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    assert list(header) != list(reversed(header))
    (tmp_path / "c.safetensors").write_bytes(
        stored(dict(reversed(header.items())), content[8 + length :])
    )
    convert(tmp_path / "c.safetensors", tmp_path / "d.safetensors")
    same(tmp_path / "d.safetensors", ALL | NEW)
    again = convert(tmp_path / "a.safetensors", tmp_path / "e.safetensors")
    assert again.output_sha256 == converted.output_sha256


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["module.a", "module.b"], "module."),
        (["module.a", "b"], ""),
        (["model.module.a", "model.module.b"], "model.module."),
        (["module.", "module.a"], ""),
        (["layer.a"], ""),
        (["_orig_mod.x.model.y"], "_orig_mod."),
    ],
)
def test_common_prefix(names, prefix):
    assert common_prefix(names) == prefix


def test_outputs_that_make_no_sense(tmp_path):
    path, folder = tmp_path / "a.safetensors", tmp_path / "folder.safetensors"
    save_file(WEIGHTS, path)
    folder.mkdir()
    for source, target, words in (
        (path, path, "its own output"),
        (path, tmp_path / "b.pth", "must end in .safetensors"),
        (path, folder, "is a folder"),
        (tmp_path / "x\x1b.pt", path, r"x\\x1b.pt does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            convert(source, target)
    assert folder.is_dir() and path.exists()
