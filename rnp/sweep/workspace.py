"""A copy of the checkout per configuration, which remembers what has finished in it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rnp.sweep.grid import PARAMS, digest

PER_COPY_FILES = (PARAMS, "dvc.lock")  # what every copy has for itself
ALWAYS_IGNORED = (
    ".git",
    "__pycache__",
    "/.dvc/cache",
    "/.dvc/tmp",
    "/.dvc/config.local",
)  # where no .gitignore says so


def sources(root: Path) -> list[str]:
    """The files that git tracks below `root`; without git all that no .gitignore excludes."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True
        ).stdout
    except FileNotFoundError:
        listed = ""
    names = listed.split("\0") if listed else unignored(root)
    return sorted(name for name in names if name not in PER_COPY_FILES and (root / name).is_file())


def unignored(root: Path) -> Iterator[str]:
    from pathspec import GitIgnoreSpec

    def below(folder: Path, rules: list[tuple[Path, GitIgnoreSpec]]) -> Iterator[str]:
        own = folder / ".gitignore"
        if own.is_file():
            rules = [*rules, (folder, GitIgnoreSpec.from_lines(own.read_text().splitlines()))]
        for path in folder.iterdir():
            inside = path.is_dir() and not path.is_symlink()
            if any(
                spec.match_file(f"{path.relative_to(base)}{'/' * inside}") for base, spec in rules
            ):
                continue
            if inside:
                yield from below(path, rules)
            else:
                yield str(path.relative_to(root))

    return below(root, [(root, GitIgnoreSpec.from_lines(ALWAYS_IGNORED))])


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The checkout as it is now: `files` by name with the digest of what they hold, and the cache
    that all copies share.
    """

    root: Path
    files: dict[str, str]
    cache: Path

    @classmethod
    def take(cls, root: Path, without: Path | None) -> Snapshot:
        """`without` is a file that changes meanwhile."""
        from dvc.config import Config

        names = [name for name in sources(root) if without is None or root / name != without]
        files = {name: hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names}
        return cls(
            root=root,
            files=files,
            cache=Path(Config(str(root / ".dvc"))["cache"].get("dir") or root / ".dvc/cache"),
        )

    def key(self, params: str, target: str) -> str:
        """Of the parameters, of the files and of the stage that is asked for."""
        return digest([params, target, *(part for item in self.files.items() for part in item)])


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One point of a grid. `folder` is its copy of the checkout, `params` the text of its
    params.yaml.
    """

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
        """What was copied (`files`); once it has finished also the key then (`done`) and the
        seconds.
        """
        try:
            return json.loads(self.memory.read_text())
        except (FileNotFoundError, ValueError):
            return {}

    def remember(self, **facts: object) -> None:
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        draft = self.memory.with_suffix(".part")
        draft.write_text(json.dumps(facts))
        draft.replace(self.memory)

    @property
    def finished(self) -> bool:
        return self.recall().get("done") == self.key

    def finish(self, seconds: float) -> None:
        self.remember(**self.recall() | {"done": self.key, "seconds": seconds})

    def copy(self, snapshot: Snapshot) -> None:
        """Bring the folder up to date with the checkout; what the stages left there stays, for DVC
        to judge.
        """
        from dvc.config import Config

        known = self.recall().get("files", [])
        self.remember(
            files=sorted({*known, *snapshot.files})
        )  # first, so that one cut short forgets no file
        for name in set(known) - snapshot.files.keys():
            (self.folder / name).unlink(missing_ok=True)
        for name, held in snapshot.files.items():
            source, target = snapshot.root / name, self.folder / name
            if not target.is_file() or hashlib.sha256(target.read_bytes()).hexdigest() != held:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.unlink(missing_ok=True)
                shutil.copy2(source, target)
        self.remember(files=sorted(snapshot.files))
        (self.folder / PARAMS).write_text(self.params)
        local = Config(str(snapshot.root / ".dvc")).load_one("local")
        with Config(str(self.folder / ".dvc")).edit("local") as config:
            config.update(local)
            config["core"] = config.get("core", {}) | {"no_scm": True}
            config["cache"] = config.get("cache", {}) | {"dir": str(snapshot.cache)}
