"""A copy of the checkout per configuration, which remembers what has finished in it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnp.errors import UserError
from rnp.io.files import read_json, sha256, write_json, write_text
from rnp.sweep.grid import PARAMS, digest

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

    IgnoreRules = tuple[Path, GitIgnoreSpec]

PER_COPY_FILES = (PARAMS, "dvc.lock")
"""Files that every copy has for itself."""
ALWAYS_IGNORED = (".git", "__pycache__", "/.dvc/cache", "/.dvc/tmp", "/.dvc/config.local")
"""Left out where no .gitignore says so."""


def sources(root: Path) -> list[str]:
    """The files that git tracks below `root`; without git all that no .gitignore excludes."""
    command = ["git", "ls-files", "-z"]
    try:
        listing = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout
    except FileNotFoundError:
        listing = ""
    names = listing.split("\0") if listing else unignored(root, root)
    return sorted(name for name in names if name not in PER_COPY_FILES and (root / name).is_file())


def unignored(root: Path, folder: Path, rules: Iterable[IgnoreRules] = ()) -> Iterator[str]:
    """The files below `folder`, a folder of `root`, that no .gitignore excludes.

    `rules` are those of the folders above, each with its folder.
    """
    from pathspec import GitIgnoreSpec

    rules = list(rules) or [(root, GitIgnoreSpec.from_lines(ALWAYS_IGNORED))]
    own = folder / ".gitignore"
    if own.is_file():
        rules.append((folder, GitIgnoreSpec.from_lines(own.read_text().splitlines())))
    for path in folder.iterdir():
        is_folder = path.is_dir() and not path.is_symlink()
        if any(
            spec.match_file(f"{path.relative_to(base)}{'/' * is_folder}") for base, spec in rules
        ):
            continue
        if is_folder:
            yield from unignored(root, path, rules)
        else:
            yield str(path.relative_to(root))


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The checkout as it is now.

    `files` are the names of its files with the digests of their contents, `cache` is the DVC cache
    that all copies share.
    """

    root: Path
    files: dict[str, str]
    cache: Path

    @classmethod
    def take(cls, root: Path, without: Path | None) -> Snapshot:
        """`without` is a file that changes meanwhile."""
        names = [name for name in sources(root) if without is None or root / name != without]
        return cls(
            root=root,
            files={name: sha256(root / name) for name in names},
            cache=Path(dvc_config(root)["cache"].get("dir") or root / ".dvc/cache"),
        )

    def key(self, params: str, target: str) -> str:
        """A digest of the parameters, of the files and of the stage to run up to."""
        return digest([params, target, *(part for item in self.files.items() for part in item)])


def dvc_config(root: Path) -> Any:
    """The configuration of a DVC project, with its own methods."""
    from dvc.config import Config

    return Config(str(root / ".dvc"))


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One point of a grid: `folder` is its copy of the checkout, `params` its params.yaml."""

    name: str
    folder: Path
    params: str
    key: str

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def memory(self) -> Path:
        return self.folder / ".rnp/sweep.json"

    def recall(self) -> dict:
        """The names of the copied files, and the key (`done`) and seconds of the last finished run.

        Of a damaged file nothing is known.
        """
        try:
            return read_json(self.memory, default={})
        except UserError:
            return {}

    def remember(self, **facts: object) -> None:
        write_json(self.memory, facts)

    @property
    def finished(self) -> bool:
        return self.recall().get("done") == self.key

    def finish(self, seconds: float) -> None:
        self.remember(**self.recall() | {"done": self.key, "seconds": seconds})

    def copy(self, snapshot: Snapshot) -> None:
        """Bring the folder up to date with the checkout.

        The outputs of stages stay there; DVC decides whether they are still valid.
        """
        known = self.recall().get("files", [])
        # First of all, so that an interrupted copy forgets no file.
        self.remember(files=sorted({*known, *snapshot.files}))
        for name in set(known) - snapshot.files.keys():
            (self.folder / name).unlink(missing_ok=True)
        for name, content in snapshot.files.items():
            target = self.folder / name
            if not target.is_file() or sha256(target) != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                shutil.copy2(snapshot.root / name, target)
        self.remember(files=sorted(snapshot.files))
        write_text(self.folder / PARAMS, self.params)
        self._configure_dvc(snapshot)

    def _configure_dvc(self, snapshot: Snapshot) -> None:
        """Let DVC use the cache of the checkout, its local settings, and no git."""
        local = dvc_config(snapshot.root).load_one("local")
        with dvc_config(self.folder).edit("local") as config:
            config.update(local)
            config["core"] = config.get("core", {}) | {"no_scm": True}
            config["cache"] = config.get("cache", {}) | {"dir": str(snapshot.cache)}
