"""Imports point down the list of layers, and importing the package's plumbing stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From top to bottom; a module may import its own layer (families: its own family only) and what
# lies below.
LAYERS = (
    ("stages",),
    ("rnp.cli", "rnp.__main__"),
    ("rnp.io", "rnp.plots", "rnp.tracking", "rnp.quarantine", "rnp.strangers"),
    ("rnp.attacks", "rnp.defenses"),
    ("rnp.detection",),
    ("rnp.unlearn", "rnp.recover", "rnp.prune"),
    (
        "rnp.training",
        "rnp.augment",
        "rnp.masks",
        "rnp.replay",
        "rnp.wiring",
        "rnp.metrics",
        "rnp.features",
        "rnp.unet",
        "rnp.models",
        "rnp.data",
        "rnp.origin",
        "rnp.graphs",
    ),
    ("rnp.types", "rnp.registry", "rnp.errors", "rnp.memory", "rnp.openmp"),
)
BLIND = (
    {"rnp.attacks", "rnp.defenses"},
    {"rnp.attacks", "rnp.detection"},
)  # what an attack knows, no defender does


def modules() -> dict[str, Path]:
    files = [*(ROOT / "rnp").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}


def place(module: str) -> tuple[int, str]:
    for depth, members in enumerate(LAYERS):
        for member in members:
            if module == member or module.startswith(f"{member}."):
                return depth, member
    raise AssertionError(f"{module} belongs to no layer")


def imported(file: Path) -> set[str]:
    """Modules of ours that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {
                (
                    f"{node.module}.{alias.name}"
                    if f"{node.module}.{alias.name}" in modules()
                    else node.module
                )
                for alias in node.names
            }
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("rnp", "stages")}


@pytest.mark.parametrize("module", sorted(m for m in modules() if not m.endswith("__init__")))
def test_imports_point_down(module):
    depth, member = place(module)
    for name in imported(modules()[module]):
        below, other = place(name)
        assert below >= depth, f"{module} imports {name}, which lies above it"
        assert {
            member,
            other,
        } not in BLIND, f"{module} imports {name}: attackers and defenders are blind to each other"


def test_package_files_are_empty():
    """But for the package's own, which lends notebooks two functions when they are asked for."""
    assert [m for m, f in modules().items() if m.endswith("__init__") and f.read_text()] == [
        "rnp.__init__"
    ]


def test_only_tracking_knows_mlflow():
    users = {m for m, f in modules().items() if "mlflow" in {n.split(".")[0] for n in external(f)}}
    assert users == {"rnp.tracking"}


def external(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize(
    "module",
    ["rnp", "rnp.cli.main", "rnp.registry", "rnp.cli.list", "rnp.quarantine", "stages.publish"],
)
def test_light_modules_import_nothing_heavy(module):
    code = (
        f"import sys, {module}; print(sorted({{'torch', 'mlflow', 'matplotlib', 'scipy', 'numpy'}}"
        " & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
