"""Help pages begin with what is required and end with what is rarely used."""

import re

import click
import pytest
from click.testing import CliRunner

from rnp.cli.help import OTHERS, GroupedCommand
from rnp.cli.main import cli


def page(*command):
    result = CliRunner().invoke(cli, [*command, "--help"])
    assert result.exit_code == 0, result.output
    return result.output


def headings(text):
    return re.findall(r"^(\S.*):$", text, re.M)


def flags(text, heading):
    section = text.partition(f"\n{heading}:\n")[2].partition("\n\n")[0]
    return re.findall(r"^  (?:-\w, )?(--[\w.-]+|[A-Z]+)", section, re.M)


def test_purify():
    text = page("purify")
    assert re.search(r"purify MODEL --clean IMAGES --out DIRECTORY\s+\[OPTIONS\]", text)
    assert headings(text) == [
        "Required",
        "Model and images",
        "Options",
        "Unlearning",
        "Recovery of masks",
        "Pruning",
        "Recovery of triggers",
    ]
    assert flags(text, "Required") == ["MODEL", "--clean", "--out"]
    assert flags(text, "Model and images")[:6] == [
        "--arch",
        "--mean",
        "--std",
        "--image-size",
        "--class-names",
        "--max-images",
    ]
    assert flags(text, "Options")[:2] == ["--seed", "--precision"]
    assert "[required]" not in text and '[default: ""]' not in text


@pytest.mark.parametrize(
    ("command", "required"),
    [
        (["inspect"], ["MODEL", "--clean"]),
        (["convert"], ["SOURCE", "--out"]),
        (["detect", "labels"], ["MODEL", "--clean"]),
        (["detect", "triggers"], ["MODEL", "--clean", "--out"]),
        (["detect", "samples"], ["MODEL", "SUSPECTS", "--clean", "--out"]),
    ],
)
def test_required_parameters_come_first(command, required):
    text = page(*command)
    assert headings(text)[0] == "Required" and flags(text, "Required") == required


@pytest.mark.parametrize("family", ["labels", "samples"])
def test_options_of_detectors_have_their_own_headings(family):
    text = page("detect", family)
    assert not [flag for flag in flags(text, "Options") if "." in flag]
    for heading in headings(text):
        if heading.startswith("Detector "):
            prefix = heading.removeprefix("Detector ").replace("_", "-")
            assert all(flag.startswith(f"--{prefix}.") for flag in flags(text, heading))


@click.command(
    cls=GroupedCommand,
    groups={"Often": ("beta", "alpha"), "Others": OTHERS, "Part": ("part.",)},
    arguments={"file": "the input"},
)
@click.option("--part.size", "size")
@click.option("--alpha")
@click.option("--gamma")
@click.option("--beta")
@click.option("--needed", required=True, help="a word")
@click.argument("file")
def toy(**_):
    """Do nothing."""


def test_every_option_is_shown_once():
    text = CliRunner().invoke(toy, ["--help"]).output
    assert text.splitlines()[0] == "Usage: toy FILE --needed TEXT [OPTIONS]"
    assert headings(text) == ["Required", "Often", "Others", "Part"]
    assert flags(text, "Required") == ["FILE", "--needed"]
    assert flags(text, "Often") == ["--beta", "--alpha"], "in the order of the group"
    assert flags(text, "Others") == ["--gamma", "--help"]
    assert flags(text, "Part") == ["--part.size"]
    assert re.search(r"FILE\s+the input", text) and re.search(
        r"--needed TEXT\s+a word$", text, re.M
    )
