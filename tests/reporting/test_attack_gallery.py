"""The page about the attacks: their documentation, their pictures and rows of results."""

import inspect
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from rnp.errors import UserError
from rnp.io.files import write_rows
from rnp.registry import load, names
from rnp.reporting.columns import COLUMNS
from tools.attack_gallery import PARTS, gallery, split


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write the page from a row about `sig` and the picture of a run of `blend`; its text."""
    monkeypatch.chdir(tmp_path)
    row = dict.fromkeys(COLUMNS, "") | {
        "preset": "cifar10-fast",
        "attack": "sig",
        "defense": "none",
        "seed": "0",
        "gate": "false",
        "clean_accuracy": "0.87",
        "attack_success_rate": "0.5",
        "clean_accuracy_benign": "0.884",
        "n_triggered": "9000",
        "settings": "a-b",
        "made": "2026",
    }
    write_rows(Path("rows.csv"), [row])
    Path("params.yaml").write_text("seed: 0\npoison: {attack: blend}\n")
    Path("reports/poison").mkdir(parents=True)

    def run(attack="blend"):
        Path("reports/poison/run.json").write_text(
            json.dumps({"params": {"poison.attack": attack, "seed": 0}})
        )
        Path("reports/poison/triggers.png").write_bytes(b"picture")
        arguments = ["docs/attacks.md", "--table", "rows.csv"]
        CliRunner().invoke(gallery, arguments, catch_exceptions=False)
        return Path("docs/attacks.md").read_text()

    return run


def test_every_attack_has_its_section_picture_and_numbers(write):
    page = write()
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == names("attack")
    assert (
        "](attacks/blend.png)" in page and Path("docs/attacks/blend.png").read_bytes() == b"picture"
    )
    assert page.count("![") == 1 and page.count("not run yet") == len(names("attack")) - 1
    assert "CA 0.870 (benign 0.884), ASR 0.500 on 9000 images; gate **failed**" in page


def test_a_picture_of_another_attack_is_refused(write):
    with pytest.raises(
        UserError, match=r"poison ran with poison.attack sig, params.yaml says blend"
    ):
        write("sig")
    assert not Path("docs/attacks/blend.png").exists()


@pytest.mark.parametrize("name", names("attack"))
def test_an_attack_says_where_it_comes_from_and_what_is_random(name):
    parts = split(inspect.getdoc(load("attack", name)))[1]
    assert {"Source", "Drawn at random", "Expected"} <= set(parts) <= set(PARTS) and all(
        parts.values()
    )


def test_labeled_sentences():
    assert split("First line\nsecond.\n\nSource: A,\nB.\nDiffers: from: that.") == (
        "First line second.",
        {"Source": "A, B.", "Differs": "from: that."},
    )
