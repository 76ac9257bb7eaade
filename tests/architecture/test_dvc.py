"""What dvc.yaml declares is what the stages need, and no defender reaches a triggered file."""

import ast
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from rnp.registry import FAMILIES, names

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in DVC.items()}
COMPUTE = sorted(set(STAGES) - {"images", "publish", "report"})
# What computes nothing: reading and writing, tracking, figures, parameters, the frame of commands.
PLUMBING = (
    "rnp/__init__.py",
    "rnp/cli/main.py",
    "rnp/cli/options.py",
    "rnp/clock.py",
    "rnp/errors.py",
    "rnp/io",
    "rnp/params",
    "rnp/registry.py",
    "rnp/reporting",
    "rnp/sweep",
    "rnp/tracking",
)
FROM_ATTACKER = ("data/poisoned", "data/triggered", "reports/poison", "reports/train")
DEFENDERS = ("unlearn", "recover", "prune", "defend")


def closure(module: str) -> set[str]:
    """Files of ours that a module imports, directly or not, as paths."""
    seen, todo = set(), [module]
    while todo:
        file = ROOT / (todo.pop().replace(".", "/") + ".py")
        if file in seen or not file.exists():
            continue
        seen.add(file)
        if covered(
            str(file.relative_to(ROOT)), ["rnp/cli/options.py", "rnp/reporting", "rnp/tracking"]
        ):
            continue  # the frame of commands, figures and logs change no result
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rnp"):
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {str(file.relative_to(ROOT)) for file in seen}


def others(path: str) -> bool:
    """An attack that is not in use: options of all are read, the code of one runs. No attack
    imports another.
    """
    return path.startswith("rnp/attacks/") and path != "rnp/attacks/base.py"


def covered(path: str, by: Sequence[str]) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in by)


def code_deps(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if dep.startswith("rnp/")]


DETECTORS = [
    f"rnp.{FAMILIES[family].replace('/', '.')}.{name}"
    for family in ("triggers", "labels", "samples")
    for name in names(family)
]


def command_module(stage: str) -> str:
    """The module of the command that the stage runs."""
    tree = ast.parse((ROOT / f"stages/{stage}.py").read_text())
    (module,) = [
        node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module.startswith("rnp.cli.")
    ]
    return module


def code_of(stage: str) -> set[str]:
    """The files that compute for a stage, whichever member of its family runs."""
    by_name = {
        "prepare": [f"rnp.data.{name}" for name in names("dataset")],
        "poison": [f"rnp.attacks.{name}" for name in names("attack")],
        "train": [f"rnp.attacks.{name}" for name in names("attack")],
        "defend": [f"rnp.defenses.{name}" for name in names("defense")],
        "detect": DETECTORS,
    }
    modules = [command_module(stage), *by_name.get(stage, [])]
    return {path for module in modules for path in closure(module) if not covered(path, PLUMBING)}


def declared_code(stage: str) -> list[str]:
    """The code that a stage declares, with every member in the place of the one in use."""
    members = {
        "${poison.attack}": names("attack"),
        "${data.name}": names("dataset"),
        "${key}": names("defense"),
    }
    declared = []
    for dep in code_deps(stage):
        variable = next((each for each in members if each in dep), "")
        declared += [dep.replace(variable, name) for name in members.get(variable, [""])]
    return declared


@pytest.mark.parametrize("stage", COMPUTE)
def test_the_code_that_computes_is_declared(stage):
    missing = {path for path in code_of(stage) if not covered(path, declared_code(stage))}
    assert missing == set(), f"{stage} runs these, dvc.yaml does not list them"


@pytest.mark.parametrize("stage", COMPUTE)
def test_declared_code_runs(stage):
    needed = code_of(stage)
    unused = [
        dep for dep in declared_code(stage) if not any(covered(path, [dep]) for path in needed)
    ]
    in_trigger_files = [f"rnp/attacks/{name}.py" for name in names("attack")]  # loaded by name
    assert set(unused) <= {*in_trigger_files, "rnp/attacks/base.py"}, f"{stage} does not run these"


@pytest.mark.parametrize("stage", DEFENDERS)
def test_defenders_see_no_attack_and_no_test_image(stage):
    read = STAGES[stage]["deps"] + STAGES[stage]["cmd"].split()
    for path in read:
        assert not covered(path, [*FROM_ATTACKER, "data/test", "data/pool"]), (
            f"{stage} reads {path}"
        )


@pytest.mark.parametrize("stage", DEFENDERS)
def test_defenders_import_no_attack(stage):
    attacks = {p for p in closure(command_module(stage)) if p.startswith("rnp/attacks/")} - {
        "rnp/attacks/base.py"
    }
    assert attacks == set()


@pytest.mark.parametrize("attack", names("attack"))
def test_no_attack_imports_another(attack):
    """Stages depend on the file of the attack in use alone, so that a new one retrains nothing."""
    assert {path for path in closure(f"rnp.attacks.{attack}") if others(path)} == {
        f"rnp/attacks/{attack}.py"
    }


@pytest.mark.parametrize("module", DETECTORS)
def test_the_code_of_every_detector_is_declared(module):
    assert {
        path for path in closure(module) if not covered(path, [*code_deps("detect"), *PLUMBING])
    } == set()


@pytest.mark.parametrize("defense", names("defense"))
def test_the_code_of_every_defense_is_declared(defense):
    declared = [dep.replace("${key}", defense) for dep in code_deps("defend")]
    assert {
        path
        for path in closure(f"rnp.defenses.{defense}")
        if not covered(path, [*declared, *PLUMBING])
    } == set()


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_every_path_on_the_command_line_is_declared(stage):
    words = STAGES[stage]["cmd"].split()
    declared = STAGES[stage].get("deps", []) + paths(stage, "outs")
    for word in words:
        if word.startswith(("data/", "models/")):
            assert covered(word, declared) or any(d.startswith(f"{word}/") for d in declared), (
                f"{word} is not declared"
            )


def paths(stage: str, kind: str) -> list[str]:
    return [next(iter(e)) if isinstance(e, dict) else e for e in STAGES[stage].get(kind, [])]


def test_no_plain_output_leaves_the_run_cache():
    """A plain output with `cache: false` would switch DVC's run cache off for its whole stage."""
    assert [s for s in STAGES for out in STAGES[s].get("outs", []) if isinstance(out, dict)] == []


def test_only_report_and_publish_read_what_holds_times():
    readers = {
        s
        for s in STAGES
        for dep in STAGES[s].get("deps", [])
        if dep.startswith("reports/") and not dep.endswith("metrics.json")
    }
    assert readers <= {"report", "publish"}
