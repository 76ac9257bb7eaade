"""The documents agree with the code and the rows in `results/`.

Tables are what the commands above them print, commands and links exist, and the code runs.
"""

import importlib
import itertools
import re
import shlex
import sys
import types
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from rnp.cli.main import cli
from rnp.io.files import read_rows
from rnp.registry import methods_in
from rnp.reporting.table import summarize
from rnp.types import DefenseSet
from tools import overview

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "docs/results.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
MEANS = " (means)"
"""Behind a command of which only the means over attacks are shown."""


def blocks(page, language=r"\w*"):
    """The code blocks of a page."""
    fence = rf"^```{language}\n(.*?)^```"
    return re.findall(fence, page.read_text(), re.MULTILINE | re.DOTALL)


def shown_tables(page):
    """Each command that stands alone on a line, and the table below it."""
    pattern = r"^`((?:rnp table|python -m) [^`]+)`(| \(means\))\n\n((?:\|.*\n)+)"
    return re.findall(pattern, page.read_text(), re.MULTILINE)


def printed(command):
    """The lines that a command of docs/results.md prints."""
    words = shlex.split(command)
    if words[0] == "rnp":
        paths = [str(ROOT / word) if word.startswith("results/") else word for word in words[1:]]
        return CliRunner().invoke(cli, paths, catch_exceptions=False).stdout.splitlines()
    assert words[-1] == "--summary"
    return importlib.import_module(words[2]).summary(read_rows(ROOT / words[3]))


@pytest.mark.parametrize("command, part, table", shown_tables(RESULTS))
def test_a_table_is_what_the_command_above_it_prints(command, part, table):
    lines = [line for line in printed(command) if line.startswith("|")]
    if part == MEANS:
        lines = lines[:2] + [line for line in lines[2:] if "| mean of " in line]
    assert table.splitlines() == lines


def test_every_row_of_results_stands_below_its_command():
    presets = tuple(f"| {path.name} |" for path in ROOT.glob("results/*/"))
    checked = {line for *_, table in shown_tables(RESULTS) for line in table.splitlines()}
    for page in PAGES:
        rows = [line for line in page.read_text().splitlines() if line.startswith(presets)]
        assert len(rows) > 100 or page != RESULTS
        assert set(rows) <= checked, page.name


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def readme_rows():
    """CA and ASR by the name of the model in the table of the README."""
    lines = [line for line in README.read_text().splitlines() if re.search(r"\| \d\.\d+ \|$", line)]
    return {cells(line)[0]: cells(line)[1:] for line in lines}


def test_the_table_of_the_readme_has_the_means_of_twelve_attacks():
    lines = summarize([ROOT / overview.TABLE]).lines
    means = {line["defense"]: line for line in lines if line["attack"] == "mean of 12"}

    def rates(line, suffix=""):
        measures = (f"clean_accuracy{suffix}", f"attack_success_rate{suffix}")
        return [f"{line[measure]:.3f}" for measure in measures]

    assert readme_rows() == {
        "backdoored model": rates(means["rnp_ft"], "_before"),
        "fine-tuning (`ft`)": rates(means["ft"]),
        "ANP (`anp`)": rates(means["anp"]),
        "RNP": rates(means["rnp"]),
        "RNP-FT (`rnp_ft`)": rates(means["rnp_ft"]),
    }


def test_the_picture_of_the_readme_has_the_numbers_of_its_table(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    bars = []
    monkeypatch.setattr(overview, "bars", lambda ax, values, *words: bars.append(values))
    overview.draw(tmp_path / "overview.png")
    rows = readme_rows()
    expected = [rows["backdoored model"], rows["RNP-FT (`rnp_ft`)"]]
    assert [[f"{value:.3f}" for value in values] for values in bars] == expected
    assert (tmp_path / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_tables_have_as_many_rules_as_headings():
    for page in (*PAGES, ROOT / "results/bench.md"):
        for heading, line in itertools.pairwise(page.read_text().splitlines()):
            if heading.startswith("|") and line.startswith("|") and set(line) <= set("|-: "):
                assert heading.count("|") == line.count("|"), (page.name, heading)


def commands(page):
    """The `rnp` commands in code blocks and in the text, without comments."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    spans = re.findall(r"`([^`]+)`", text)
    lines = [line.partition("  #")[0] for block in blocks(page) for line in block.splitlines()]
    parts = [part.strip() for line in (*lines, *spans) for part in re.split(r"&&|>", line)]
    return [part for part in parts if part.startswith("rnp ")]


def test_commands_of_blocks_and_text_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("See\n`rnp list`.\n```\nmake && rnp table  # prints\nrnp check > file\n```\n")
    assert commands(page) == ["rnp table", "rnp check", "rnp list"]


def new_methods(page):
    """The names of the methods whose files a page shows."""
    paths = [re.match(r"# (rnp/\S*)\n", code) for code in blocks(page, "python")]
    return {Path(path[1]).stem for path in paths if path}


def resolve(words, unknown):
    """The command that the words of a line begin with, and the words behind its name.

    Sub-commands of the names in `unknown` exist once their methods do.
    """
    command = cli
    while isinstance(command, click.Group) and words and re.match(r"[a-z]", words[0]):
        if words[0] in unknown:
            break
        subcommand = command.get_command(click.Context(command), words[0])
        assert subcommand, f"there is no command {words[0]}"
        command = subcommand
        words = words[1:]
    return command, words


@each_page
def test_commands_exist_with_their_options(page):
    for line in commands(page):
        command, words = resolve(shlex.split(line.replace("…", ""))[1:], new_methods(page))
        known = {option for param in command.params for option in param.opts + param.secondary_opts}
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        assert flags <= known | {"-h", "--help"}, f"{line}: {flags - known}"


def anchors(page):
    """The anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_lines_fit_on_a_screen():
    for page in PAGES:
        lines = [line for line in page.read_text().splitlines() if not line.startswith("|")]
        # a tool writes the page of attacks from docstrings
        assert page.name == "attacks.md" or max(map(len, lines)) <= 120, page.name


def test_the_code_of_the_readme_runs(trained, toy_set, unchanged):
    sets = {"": toy_set(40, seed=3), "more_": toy_set(40, seed=4)}
    names = {"model": unchanged(trained), "classes": sets[""].classes}
    for prefix, data in sets.items():
        names |= {f"{prefix}images": data.images, f"{prefix}labels": data.labels}
    (code,) = blocks(README, "python")
    exec(code, names)
    assert not names["repaired"].training


@pytest.fixture
def methods(monkeypatch):
    """The methods of CONTRIBUTING.md by family, with their defaults."""
    methods = {}
    for code in blocks(ROOT / "CONTRIBUTING.md", "python"):
        path = re.match(r"# (rnp/.*)\.py\n", code)
        assert path, "the first line names the file"
        module = types.ModuleType(path[1].replace("/", "."))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(code, vars(module))
        (method,) = methods_in(module)
        methods[path[1].split("/")[1]] = method()
    return methods


def test_the_methods_of_contributing_run(methods, trained, toy_set, unchanged, rng):
    data = toy_set(40)
    poisoned = methods["attacks"].poison(data, rng=rng())
    repaired = methods["defenses"].repair(unchanged(trained), DefenseSet(data, data), rng=rng())
    scores = methods["detection"].score(unchanged(trained), data.images, data, rng=rng())
    assert len(poisoned.positions) == 4 and repaired.chosen in repaired.sweep
    assert scores.shape == (40,) and torch.isfinite(scores).all()
