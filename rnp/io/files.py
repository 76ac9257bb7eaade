"""Text, JSON and CSV files, each written completely or not at all. Imports neither PyTorch nor
NumPy.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from rnp.errors import UserError


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which replaces `path` if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield draft
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(draft, path)
    finally:
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_write(path) as draft:
        draft.write_text(text)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path, default: dict | None = None) -> dict:
    """The object in a JSON file; `default`, if it is given, where there is no file.

    Raises: UserError when there is neither a file nor a default, or no JSON object in it.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        if default is None:
            raise missing_file_error(path) from None
        return default
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def missing_file_error(path: Path) -> UserError:
    return UserError(f"{path} does not exist; run the stage that writes it, or check the path")


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_rows(path: Path, rows: list[dict]) -> None:
    with atomic_write(path) as draft, draft.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def upsert_rows(
    path: Path, rows: list[dict[str, object]], columns: Sequence[str], key: Sequence[str]
) -> None:
    """Add rows to a table of results, sorted by `key`; they replace older ones with the same key.

    Raises: UserError when the table there has other columns.
    """
    old = read_rows(path) if path.exists() else []
    if old and list(old[0]) != list(columns):
        raise UserError(f"{path} has other columns than rows of this version; write to a new file")

    def identity(row: dict) -> list[str]:
        return [str(row[name]) for name in key]

    replaced = [identity(row) for row in rows]
    kept = [row for row in old if identity(row) not in replaced]
    write_rows(path, sorted([*rows, *kept], key=identity))
