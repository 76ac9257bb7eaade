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
from rnp.params.fields import argument, build_from_values, iter_hyperparameters
from rnp.params.presets import presets, render
from rnp.params.read import flatten, read_params
from rnp.params.schema import check_params, find_sections

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
        wanted = {key for cls, prefix in classes for key, *_ in iter_hyperparameters(cls, prefix)}
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
    ("prune.epsilon", 2.0, "prune.epsilon must be in [0, 1), got 2; it is a fraction, not percent"),
    (
        "attacks.badnets.poison_rate",
        10.0,
        "poison_rate must be in (0, 1], got 10; did you mean 0.10?",
    ),
    ("attacks.blend.alpha", 0.0, "alpha must be in (0, 1], got 0"),
    ("poison.attack", "badnet", "'badnet' is not one of"),
    ("model.arch", "resnet-18", "unknown architecture 'resnet-18'; did you mean 'resnet18'?"),
    ("data.defense_train", 0, "defense_train must be at least 1, got 0"),
    ("seed", "one", "seed must be a whole number, got 'one'"),
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
    values = {argument(name): default for name, _, _, default in iter_hyperparameters(cls, prefix)}
    assert build_from_values(cls, values, prefix) == cls()
