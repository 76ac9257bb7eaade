"""CIFAR-10 as a few files of half its size, and back byte for byte.

The images are stacked in lossless WebP files; the rest of each file is compressed with LZMA.
`benchmarks.campaign` has the commands.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import math
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from benchmarks.subprocesses import say
from rnp.cli.prepare import data_root
from rnp.errors import UserError
from rnp.io.files import atomic_write

MIB = 2**20
STRIP = 500  # images in one WebP; its height must be less than 16,384 pixels


def checksums() -> dict[str, str]:
    """The files of CIFAR-10 with the MD5 that torchvision expects."""
    files = {name: md5 for name, md5 in (*CIFAR10.train_list, *CIFAR10.test_list)}
    return files | {CIFAR10.meta["filename"]: CIFAR10.meta["md5"]}


def check(name: str, content: bytes) -> bytes:
    """Raises: UserError when it is not what torchvision expects."""
    if hashlib.md5(content).hexdigest() != checksums()[name]:
        raise UserError(f"{name} of CIFAR-10 is damaged, or a part of it is missing")
    return content


def shrink(name: str, content: bytes) -> dict[str, bytes]:
    """A file of CIFAR-10: its images in WebP, and the bytes before and after them."""
    pixels = pickle.loads(content, encoding="latin1").get("data", np.empty((0, 3072), np.uint8))
    raw = pixels.tobytes()
    start = content.index(raw)
    rest = content[:start] + content[start + len(raw) :]
    members = {f"{name}/{start}.xz": lzma.compress(rest)}
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for first in range(0, len(images), STRIP):
        strip = images[first : first + STRIP].reshape(-1, 32, 3)
        file = io.BytesIO()
        Image.fromarray(strip).save(file, "webp", lossless=True, quality=60, method=6)
        members[f"{name}/{first:05}.webp"] = file.getvalue()
    return members


def grow(members: dict[str, bytes]) -> bytes:
    """The file from which `shrink` made these members."""
    rest = next(name for name in members if name.endswith(".xz"))
    files = [io.BytesIO(members[name]) for name in sorted(members) if name != rest]
    strips = [np.asarray(Image.open(file)).reshape(-1, 32, 32, 3) for file in files]
    images = [strip.transpose(0, 3, 1, 2).tobytes() for strip in strips]
    around = lzma.decompress(members[rest])
    start = int(Path(rest).stem)
    return b"".join([around[:start], *images, around[start:]])


def pack(folder: Path, limit: int) -> None:
    """Write CIFAR-10 to `folder` as files of about equal size, below `limit` bytes each."""
    members: dict[str, bytes] = {}
    source = data_root() / CIFAR10.base_folder
    for name in checksums():
        members |= shrink(name, check(name, (source / name).read_bytes()))
        say(f"{name}: {sum(map(len, members.values())) / MIB:.1f} MiB so far")
    total = sum(map(len, members.values()))
    parts = math.ceil(total / (limit - MIB))  # a part exceeds its share by one member at most
    before = 0
    shares = [dict[str, bytes]() for _ in range(parts)]
    for name, content in members.items():
        shares[before * parts // total][name] = content
        before += len(content)
    for number, share in enumerate(shares, 1):
        file = folder / f"part-{number}-of-{parts}.tar"
        with (
            atomic_write(file) as draft,
            tarfile.open(draft, "w", format=tarfile.USTAR_FORMAT) as tar,
        ):
            for name, content in share.items():
                header = tarfile.TarInfo(name)
                header.size = len(content)
                tar.addfile(header, io.BytesIO(content))
        say(f"{file}: {file.stat().st_size / MIB:.1f} MiB")


def unpack(folders: Sequence[Path], data: Path) -> None:
    """Make the files of CIFAR-10 below `data` from all parts in `folders`.

    Raises: UserError when one is missing or damaged.
    """
    members: dict[str, dict[str, bytes]] = {name: {} for name in checksums()}
    for file in (file for folder in folders for file in folder.glob("part-*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None:
                    members[Path(member.name).parent.name][member.name] = content.read()
    for name, of_file in members.items():
        if not any(member.endswith(".xz") for member in of_file):
            raise UserError(f"no part holds the beginning of {name}")
        with atomic_write(data / CIFAR10.base_folder / name) as draft:
            draft.write_bytes(check(name, grow(of_file)))
    say(f"{data / CIFAR10.base_folder} is complete")
