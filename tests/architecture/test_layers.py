"""Imports point down the list of layers, and importing the package's plumbing stays cheap."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From top to bottom; a module may import its own layer (families: its own family only) and what is
# below. `params.schema` and `params.presets` know the options of everything, so they are high up.
LAYERS = (
    ("stages",),
    ("rnp.cli", "rnp.__main__"),
    ("rnp.untrusted", "rnp.sweep", "rnp.reporting", "rnp.params.schema", "rnp.params.presets"),
    ("rnp.evaluation",),
    ("rnp.attacks", "rnp.defenses", "rnp.detection", "rnp.rebuild"),
    ("rnp.io", "rnp.tracking"),
    ("rnp.unlearn", "rnp.recover", "rnp.prune"),
    ("rnp.neurons", "rnp.training", "rnp.models", "rnp.data"),
    ("rnp.types", "rnp.registry", "rnp.seeds", "rnp.clock", "rnp.params.choices"),
    ("rnp.params", "rnp.errors"),
)
BLIND = (  # what an attack knows, no defender does
    {"rnp.attacks", "rnp.defenses"},
    {"rnp.attacks", "rnp.detection"},
)


def modules() -> dict[str, Path]:
    files = [*(ROOT / "rnp").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}


def place(module: str) -> tuple[int, str]:
    """Depth and name of the layer's member with the longest name that fits."""
    fitting = [
        (len(member), depth, member)
        for depth, members in enumerate(LAYERS)
        for member in members
        if module == member or module.startswith(f"{member}.")
    ]
    assert fitting, f"{module} belongs to no layer"
    _, depth, member = max(fitting)
    return depth, member


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


def test_no_circle_among_imports():
    """The package itself lends notebooks its nouns when they are asked for; it counts as none."""
    graph = {
        name: imported(file) - {"rnp"} for name, file in modules().items() if name != "rnp.__init__"
    }
    sorter = graphlib.TopologicalSorter(graph)
    sorter.prepare()  # raises CycleError, which names the circle


def test_few_files_stand_alone():
    assert len(list((ROOT / "rnp").glob("*.py"))) <= 12


def code_lines(file: Path) -> int:
    """Lines that are neither blank, nor part of an import or a docstring."""
    text = file.read_text()
    other = {number for number, line in enumerate(text.splitlines(), 1) if not line.strip()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            other |= set(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            other |= set(range(node.lineno, node.end_lineno + 1))
    return len(text.splitlines()) - len(other)


def test_commands_are_short():
    """They parse, call and print; what computes is elsewhere."""
    assert sum(code_lines(file) for file in (ROOT / "rnp/cli").glob("*.py")) < 1300


def test_package_files_are_empty():
    """But for the package's own, which lends notebooks two functions when they are asked for."""
    assert [m for m, f in modules().items() if m.endswith("__init__") and f.read_text()] == [
        "rnp.__init__"
    ]


def test_only_tracking_knows_mlflow():
    users = {m for m, f in modules().items() if "mlflow" in {n.split(".")[0] for n in external(f)}}
    assert users == {"rnp.tracking.models", "rnp.tracking.store"}


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
    [
        "rnp",
        "rnp.cli.main",
        "rnp.registry",
        "rnp.cli.list",
        "rnp.io.files",
        "rnp.untrusted.sandbox",
        "stages.publish",
    ],
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
