"""A stage hands its sections of params.yaml to its command, and records what was in use."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import stages.stage
from rnp.attacks.badnets import BadNets
from rnp.cli.options import Family, command
from rnp.evaluation.controls import Controls
from rnp.params.presets import render
from rnp.params.schema import check_params
from rnp.recover import Recover
from rnp.registry import load
from rnp.reporting.stages import COSTS
from rnp.training.device import chosen_precision
from rnp.unlearn import Unlearn


@pytest.fixture
def params(tmp_path, monkeypatch):
    """`params(section, key=value)` changes params.yaml of the current folder, that of `demo`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages.stage, "check_params", check_params)
    monkeypatch.setenv("RNP_TRACKING", "off")
    content = yaml.safe_load(render("demo"))
    file = Path("params.yaml")
    file.write_text(yaml.safe_dump(content))

    def change(section: str, **values: object) -> None:
        content[section] |= values
        file.write_text(yaml.safe_dump(content))

    return change


@pytest.fixture
def run(monkeypatch, params):
    """`run(hyperparameters, sections, *arguments)`: what the command of a stage received."""

    def call(classes, sections, *arguments, **where):
        received = []

        def work(*options, files, seed):
            files.report.mkdir()
            received.extend([*options, seed, chosen_precision()])

        stage = command("toy", *classes, outputs={})(work)
        monkeypatch.setattr(sys, "argv", ["toy", "--report", "report", *arguments])
        stages.stage.main(stage, *sections, **where)
        return received

    return call


def recorded() -> dict:
    return json.loads(Path("report/run.json").read_text())["params"]


def test_sections_are_the_defaults_of_options(run, params):
    params("recover", lr=0.3, augment={"crop": 2, "flip": False})
    method, seed, precision = run([Recover], ["recover"])
    assert method.lr == 0.3 and method.augment.crop == 2 and method.augment.flip is False
    assert (seed, precision) == (0, "auto")
    assert recorded()["recover.lr"] == 0.3 and recorded()["recover.augment.crop"] == 2


def test_the_command_line_overrides_the_file(run, params):
    params("recover", lr=0.3)
    method, _, precision = run([Recover], ["recover"], "--lr", "0.5", "--precision", "fp32")
    assert (method.lr, precision) == (0.5, "fp32")
    assert recorded()["recover.lr"] == 0.5 and recorded()["precision"] == "fp32"


def test_a_key_that_is_left_out_has_its_default(run, params):
    content = yaml.safe_load(Path("params.yaml").read_text())
    del content["recover"]["steps"]
    Path("params.yaml").write_text(yaml.safe_dump(content))
    assert run([Recover], ["recover"])[0].steps == Recover().steps
    assert recorded()["recover.steps"] == Recover().steps


def test_an_empty_list_is_an_empty_list(run, params):
    params("controls", experiments=[])
    assert run([Controls], ["controls"])[0].experiments == ()


def test_options_behind_the_name_of_their_section(run, params):
    params("unlearn", epochs=7)
    method, other, *_ = run(
        [Recover, (Unlearn, "unlearn.")], ["recover"], "--unlearn.lr", "0.5", prefixed=("unlearn",)
    )
    assert (method.lr, other.epochs, other.lr) == (0.2, 7, 0.5)
    assert recorded()["unlearn.epochs"] == 7 and recorded()["unlearn.lr"] == 0.5


def test_a_family_takes_the_part_of_its_member(monkeypatch, params):
    params("attacks", badnets={"size": 5})
    received = []

    def work(attack, *, files, seed):
        files.report.mkdir()
        received.append(attack)

    def make(name):
        return command(name, load("attack", name), outputs={})(work)

    family = Family("poison", family="attack", make=make)
    monkeypatch.setattr(sys, "argv", ["poison", "badnets", "--report", "report", "--margin", "1"])
    stages.stage.main(family, family="attacks")
    assert received == [BadNets(size=5, margin=1)]
    used = {key for key in recorded() if key.startswith("attacks.")}
    assert used == {f"attacks.badnets.{field}" for field in vars(received[0])}


@pytest.mark.parametrize(
    "section, key", [("prune", "rulle"), ("attacks", "badnet"), ("train", "optimiser")]
)
def test_a_typo_anywhere_ends_before_any_work(run, params, capsys, section, key):
    params(section, **{key: {"size": 3} if section == "attacks" else 1})
    with pytest.raises(SystemExit) as end:
        run([Recover], ["recover"])
    assert end.value.code == 2 and not Path("report").exists()
    error = capsys.readouterr().err
    assert f"unknown key {section}.{key}" in error and "did you mean" in error


@pytest.mark.parametrize("inputs, counted", [(("defense",), True), (("test",), False)])
def test_multiply_adds_are_recorded_where_the_defenders_images_are(
    monkeypatch, params, inputs, counted
):
    """3 images times 5 outputs times 4 inputs, and as many for the weights' gradient."""
    Path("images").mkdir()

    def work(*, files, seed):
        files.report.mkdir()
        torch.nn.Linear(4, 5)(torch.ones(3, 4)).sum().backward()

    stage = command("toy", inputs=inputs, outputs={})(work)
    monkeypatch.setattr(sys, "argv", ["toy", f"--{inputs[0]}", "images", "--report", "report"])
    stages.stage.main(stage)
    run = json.loads(Path("report/run.json").read_text())
    found = {name: run[name] for name in COSTS[1:] if name in run}
    assert found == ({name: 60 for name in COSTS[1:]} if counted else {})
    assert run["seconds"] >= 0
