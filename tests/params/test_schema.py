"""params.yaml: presets are complete, and every kind of mistake ends in one line that names the
value and the way out.
"""

import copy
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from rnp.cli.main import cli
from rnp.errors import UserError
from rnp.params.fields import build_from_values, iter_hyperparameters
from rnp.params.presets import presets, render
from rnp.params.read import flatten, params_in_use, read_params
from rnp.params.schema import check_params, find_sections, json_schema

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    path = tmp_path_factory.mktemp("params") / "params.yaml"
    path.write_text(render("demo"))
    return read_params(path)


@pytest.mark.parametrize("name", presets())
def test_presets_are_complete_and_valid(name, tmp_path):
    (tmp_path / "params.yaml").write_text(render(name))
    params = read_params(tmp_path / "params.yaml")
    check_params(params)
    assert params["preset"] == name
    for section, classes in find_sections().items():
        wanted = {
            each.name for cls, prefix in classes for each in iter_hyperparameters(cls, prefix)
        }
        if section == "defenses":
            wanted = {key for key in wanted if key.split(".")[0] in params["defenses"]}
        assert set(dict(flatten(params[section]))) == wanted


@pytest.mark.parametrize("name", presets())
def test_yaml_1_1_and_1_2_read_presets_alike(name, tmp_path):
    (tmp_path / "params.yaml").write_text(render(name))
    assert yaml.safe_load(render(name)) == read_params(tmp_path / "params.yaml")


def test_the_committed_params_hold_every_option():
    check_params(read_params(ROOT / "params.yaml"))


def test_numbers_as_dvc_writes_them(tmp_path):
    (tmp_path / "p.yaml").write_text("a: 1e-05\nb: 1e3\nc: off\nd: .5\ne: 3\nf: -2.5e-1\ng: 1.\n")
    assert read_params(tmp_path / "p.yaml") == {
        "a": 1e-5,
        "b": 1000.0,
        "c": "off",
        "d": 0.5,
        "e": 3,
        "f": -0.25,
        "g": 1.0,
    }


MISTAKES = [
    ("unlearn.lrr", 1, "unknown key unlearn.lrr; did you mean 'lr'?"),
    ("unlern", {}, "unknown section 'unlern'; did you mean 'unlearn'?"),
    ("unlearn.lr", -1.0, "unlearn: unlearn.lr must be above 0, got -1"),
    ("unlearn.lr", "fast", "unlearn.lr: 'fast' is not a valid float"),
    ("unlearn.optimizer", "sdg", "'sdg' is not one of 'sgd', 'adam'"),
    ("unlearn.milestones", 10, "unlearn.milestones must be a list, got 10"),
    ("recover.steps", [1], "recover.steps must be one value, got [1]"),
    ("recover.steps", True, "recover.steps must be int, got True"),
    ("recover.steps", 0, "recover.steps must be above 0, got 0"),
    (
        "prune.max_accuracy_drop",
        2.0,
        "prune.max_accuracy_drop must be in [0, 1), got 2; it is a fraction, not percent: did",
    ),
    (
        "attacks.badnets.poison_rate",
        10.0,
        "badnets.poison_rate must be in (0, 1], got 10; it is a fraction, not percent: did you",
    ),
    ("attacks.blend.alpha", 0.0, "alpha must be in (0, 1], got 0"),
    ("poison.attack", "badnet", "'badnet' is not one of"),
    ("model.arch", "resnet-18", "unknown architecture 'resnet-18'; did you mean 'resnet18'?"),
    ("data.defense_train", 0, "defense_train must be at least 1, got 0"),
    ("seed", "one", "seed must be a whole number, got 'one'"),
    ("precision", "fp23", "unknown precision 'fp23'; did you mean 'fp32'?"),
    ("defenses.fx", {}, "unknown key defenses.fx"),
    ("defenses.rnp", {}, "the stages unlearn, recover and prune are RNP"),
    ("train", None, "section 'train' is missing"),
    (
        "evaluate.defenses",
        [],
        "evaluate.defenses names [], but the sections under defenses are ['ft']",
    ),
]


@pytest.mark.parametrize(
    ("key", "value", "message"), MISTAKES, ids=[f"{k}={v}" for k, v, _ in MISTAKES]
)
def test_mistakes_are_named(demo, key, value, message):
    params = copy.deepcopy(demo)
    *parents, leaf = key.split(".")
    inner = params
    for parent in parents:
        inner = inner[parent]
    inner[leaf] = value
    with pytest.raises(UserError) as error:
        check_params(params)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "no valid YAML"), ("- 1", "must be a mapping")]
)
def test_unreadable_params(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_params(tmp_path / "params.yaml")


def test_missing_params():
    with pytest.raises(UserError, match="rnp preset demo"):
        read_params(Path("nowhere.yaml"))


def test_list_names_every_method():
    import json

    found = json.loads(CliRunner().invoke(cli, ["list", "--json"]).output)
    assert {"badnets", "blend", "sig", "wanet", "adaptive_blend"} <= set(found["attacks"])
    assert {"digits", "shapes", "cifar10", "imagefolder"} == set(found["datasets"])
    assert found["presets"] == presets()
    plain = CliRunner().invoke(cli, ["list"]).output
    assert all(name in plain for members in found.values() for name in members)


@pytest.mark.parametrize(
    "cls, prefix",
    [pair for pairs in find_sections().values() for pair in pairs],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_command_without_options_is_the_method_without_arguments(cls, prefix):
    """Also where a method holds another one with settings of its own."""
    values = {each.argument: each.default for each in iter_hyperparameters(cls, prefix)}
    assert build_from_values(cls, values, prefix) == cls()


def test_a_check_completes_the_file(demo):
    """Keys that are left out get their defaults, and an empty list is an empty list."""
    params = copy.deepcopy(demo)
    del params["unlearn"]["lr"]
    del params["precision"]
    params["unlearn"]["milestones"] = []
    complete = check_params(params)
    assert complete["unlearn"]["lr"] == 0.001 and complete["precision"] == "auto"
    assert complete["unlearn"]["milestones"] == ()
    assert dict(flatten(complete)).keys() == dict(flatten(demo)).keys()


def test_parameters_in_use(demo):
    """The options of one data set, one attack, and the detectors that run."""
    used = dict(flatten(params_in_use(demo)))
    sections = {tuple(key.split(".")[:2]) for key in used if "." in key}
    assert {name for family, name in sections if family == "attacks"} == {"badnets"}
    assert {name for family, name in sections if family == "datasets"} == {"shapes"}
    assert "detect.neural_cleanse.steps" in used and "detect.strip.overlays" in used
    assert "detect.badexpert.lr" not in used and len(used) < 115


def test_the_schema_knows_every_key_and_its_range(demo):
    """An editor that reads it flags what `check_params` refuses."""

    def keys(schema: dict, prefix: str = "") -> set[str]:
        found = set()
        for name, inner in schema["properties"].items():
            nested = inner.get("properties")
            found |= keys(inner, f"{prefix}{name}.") if nested else {f"{prefix}{name}"}
        return found

    schema = json_schema()
    wanted = {key for key, _ in flatten(demo) if not key.startswith("defenses.")}
    assert wanted <= keys(schema)
    rate = schema["properties"]["attacks"]["properties"]["badnets"]["properties"]["poison_rate"]
    assert rate["exclusiveMinimum"] == 0 and rate["maximum"] == 1 and rate["default"] == 0.1
    labels = schema["properties"]["detect"]["properties"]["labels"]
    assert labels["type"] == "array" and labels["items"] == {"type": "string"}
    assert schema["additionalProperties"] is False
