"""The tables of the README and of docs/results.md are what `rnp table` and the benchmarks print of
the rows in `results/`.
"""

import itertools
import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks import steps
from experiments import architectures, population, schedules, selection
from rnp.cli.main import cli
from rnp.io.files import read_rows

ROOT = Path(__file__).parents[2]
MEASURES = (
    "attack_success_rate",
    "clean_accuracy",
    "clean_accuracy_before",
    "robust_accuracy",
    "der",
    "label_correct",
    "auroc",
    "l1",
    "iou",
    "neurons_pruned",
    "seconds",
)


def test_no_row_is_stale():
    printed = set()
    for path, measure in itertools.product(sorted(ROOT.glob("results/*/*.csv")), (None, *MEASURES)):
        done = CliRunner().invoke(
            cli, ["table", str(path), *(["--measure", measure] if measure else [])]
        )
        printed |= set(done.output.splitlines())
    presets = tuple(f"| {path.name} |" for path in ROOT.glob("results/*/"))
    shown = [
        line
        for page in ("README.md", "docs/results.md")
        for line in (ROOT / page).read_text().splitlines()
        if line.startswith(presets)
    ]
    assert len(shown) > 50 and not [line for line in shown if line not in printed]


@pytest.mark.parametrize(
    "rows, summary",
    [
        ("demo/population.csv", population.summary),
        ("cifar10-fast/population.csv", population.summary),
        ("cifar10-fast/selection.csv", selection.summary),
        ("demo/architectures.csv", architectures.summary),
        ("cifar10/steps.csv", steps.summary),
        ("cifar10-fast/schedules.csv", schedules.summary),
    ],
)
def test_no_summary_is_stale(rows, summary):
    page = (ROOT / "docs/results.md").read_text()
    assert "\n".join(summary(read_rows(ROOT / "results" / rows))) in page


def test_tables_have_as_many_rules_as_headings():
    for page in (*PAGES, ROOT / "results/bench.md"):
        for heading, line in itertools.pairwise(page.read_text().splitlines()):
            if heading.startswith("|") and line.startswith("|") and set(line) <= set("|-: "):
                assert heading.count("|") == line.count("|"), (page.name, heading)


PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))


def commands(page: Path) -> list[str]:
    """The `rnp` command lines in the code blocks of a page, without their comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line.partition("  #")[0] for line in lines if line.startswith("rnp ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_their_options(page):
    for line in commands(page):
        words = shlex.split(line.replace("…", "").partition("&&")[0].partition(">")[0])[1:]
        context = click.Context(cli)
        command: click.Command = cli
        while isinstance(command, click.Group) and words:
            name = words.pop(0)
            found = command.get_command(context, name)
            assert found, f"{line}: no command {name}"
            command = found
        known = {option for param in command.params for option in param.opts + param.secondary_opts}
        flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)}
        assert flags <= known | {"-h", "--help"}, f"{line}: {flags - known}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
