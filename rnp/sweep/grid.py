"""The configurations of a grid of parameters."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from rnp.errors import UserError

PARAMS = "params.yaml"
LONGEST = 120  # characters of a name; file systems take 255 bytes


def grid(overrides: Iterable[str], params: Path) -> dict[str, str]:
    """The text of params.yaml for each configuration, by its name.

    DVC parses and applies the overrides, as for `dvc exp run`.

    Raises: UserError when DVC refuses one of them.
    """
    from dvc.exceptions import DvcException
    from dvc.utils.cli_parse import to_path_overrides
    from dvc.utils.hydra import get_hydra_sweeps
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        by_file = to_path_overrides(overrides)
        if other := sorted(by_file.keys() - {PARAMS}):
            raise UserError(f"-S changes {PARAMS}, not {other[0]}")
        changes = [point[PARAMS] for point in get_hydra_sweeps(by_file)]
        return {label(change): changed(params, change) for change in changes}
    except (DvcException, HydraException, OmegaConfBaseException) as error:
        raise UserError(f"-S: {' '.join(str(error.__cause__ or error).split())}") from error


def changed(params: Path, overrides: list[str]) -> str:
    """The text of a params.yaml with overrides applied."""
    from dvc.utils.hydra import apply_overrides

    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder, PARAMS)
        shutil.copy(params, draft)
        apply_overrides(draft, overrides)
        return draft.read_text()


def label(overrides: list[str]) -> str:
    """A name for a folder; a digest makes it unique where it cannot hold all the overrides."""
    text = ",".join(overrides)
    name = re.sub(r"[^\w.=,+-]", "_", text, flags=re.ASCII).lstrip(".-")[:LONGEST]
    return name if name == text else f"{name}-{digest([text])[:8]}"


def digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
