"""What dvc.yaml declares is what the stages need, and no defender reaches a triggered file."""

import ast
from pathlib import Path

import pytest
import yaml

from rnp.registry import FAMILIES, names

ROOT = Path(__file__).parents[2]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
STAGES = {name: stage.get("do", stage) for name, stage in DVC.items()}
COMPUTE = sorted(set(STAGES) - {"publish", "report"})
# Plumbing: a fix of a message, a figure or a file format must not retrain a model.
PLUMBING = (
    "rnp/cli",
    "rnp/io.py",
    "rnp/plots.py",
    "rnp/tracking.py",
    "rnp/types.py",
    "rnp/registry.py",
    "rnp/errors.py",
    "rnp/memory.py",
    "rnp/openmp.py",
    "rnp/__init__.py",
)
# The library that io and the options of other commands pull in, without which a stage computes the
# same.
INCIDENTAL = {
    "rnp/attacks/base.py": {
        "prepare",
        "benign",
        "unlearn",
        "recover",
        "prune",
        "defend",
        "evaluate",
        "controls",
    },
    "rnp/detection/base.py": {"controls"},
    "rnp/features.py": {"controls"},
    "rnp/models": {"prepare"},
    "rnp/training.py": {"prepare"},
    "rnp/graphs.py": {"prepare"},
    "rnp/augment.py": {"prepare"},
    "rnp/masks.py": {"train"},
}
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
        if file.name in ("plots.py", "tracking.py"):  # pictures and logs change no result
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("rnp"):
                todo += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {str(file.relative_to(ROOT)) for file in seen}


def others(path: str) -> bool:
    """An attack that is not in use: options of all are read, the code of one runs. No attack
    imports another.
    """
    return path.startswith("rnp/attacks/") and path != "rnp/attacks/base.py"


def covered(path: str, by: list[str]) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in by)


def code_deps(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if dep.startswith("rnp/")]


DETECTORS = [
    f"rnp.{FAMILIES[family].replace('/', '.')}.{name}"
    for family in ("triggers", "labels", "samples")
    for name in names(family)
]


@pytest.mark.parametrize("stage", COMPUTE)
def test_declared_code_is_imported_code(stage):
    needed = {
        path
        for path in closure(f"rnp.cli.{stage}")
        if not covered(path, list(PLUMBING)) and not others(path)
    }
    incidental = [path for path, stages in INCIDENTAL.items() if stage in stages]
    missing = {p for p in needed if not covered(p, code_deps(stage)) and not covered(p, incidental)}
    assert missing == set(), f"{stage} imports these, dvc.yaml does not list them"
    unused = [
        d for d in code_deps(stage) if "${" not in d and not any(covered(p, [d]) for p in needed)
    ]
    by_name = {"prepare": ["rnp/data"]} | {
        key: ["rnp/features.py", "rnp/unet.py"] for key in ("poison", "train", "detect")
    }
    by_name["detect"] = [
        *by_name["detect"],
        *(path for module in DETECTORS for path in closure(module)),
    ]
    by_name["defend"] = [
        path for name in names("defense") for path in closure(f"rnp.defenses.{name}")
    ]
    assert [d for d in unused if d not in by_name.get(stage, [])] == [], (
        f"{stage} lists these and does not import them"
    )


@pytest.mark.parametrize("stage", DEFENDERS)
def test_defenders_see_no_attack_and_no_test_image(stage):
    read = STAGES[stage]["deps"] + STAGES[stage]["cmd"].split()
    for path in read:
        assert not covered(path, [*FROM_ATTACKER, "data/test", "data/pool"]), (
            f"{stage} reads {path}"
        )


@pytest.mark.parametrize("stage", DEFENDERS)
def test_defenders_import_no_attack(stage):
    attacks = {p for p in closure(f"rnp.cli.{stage}") if p.startswith("rnp/attacks/")} - {
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
