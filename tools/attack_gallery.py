"""Write the page that shows every attack: what it does to an image, who controls what, and what
was measured.
"""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path

import click

from rnp.attacks.base import Attack
from rnp.params.read import read_params
from rnp.registry import load, names
from rnp.reporting.rows import load_current_runs
from rnp.reporting.table import latest_comparable, read

PARTS = ("Drawn at random", "Source", "Differs", "Expected")
INTRODUCTION = """# Attacks

What each attack does to an image, what its attacker controls, and what came out. In the pictures, from top to bottom: the clean
image, the image with the trigger as at test time, their difference times five, and the image that the training set holds in
its place (attacks that poison no data show the clean one). The measured numbers are those of the backdoored model, before any
defense; the rows with seconds, machine and versions are in `{table}`. A *gate* asks whether the backdoor is real: ASR at
least the value given and CA at most .02 below that of a benign model trained alike (the benign model). An attack that fails it stays
out of the means over attacks.

Made by `rnp gallery`, from the documentation of each attack, its pictures and that table.
"""


@click.command()
@click.argument("page", type=click.Path(path_type=Path))
@click.option(
    "--table",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="rows of `rnp rows --defense none`",
)
@click.option("--reports", type=click.Path(path_type=Path), default="reports", show_default=True)
@click.option("--params", type=click.Path(path_type=Path), default="params.yaml", show_default=True)
def gallery(page: Path, table: Path, reports: Path, params: Path) -> None:
    """Take the picture of this folder's poisoning into the folder beside PAGE, and write PAGE
    anew, with all attacks.
    """
    pictures = page.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    if (reports / "poison" / "run.json").exists():
        settings = read_params(params)
        load_current_runs(reports, settings, ("poison",))
        shutil.copyfile(
            reports / "poison" / "triggers.png", pictures / f"{settings['poison']['attack']}.png"
        )
    rows = {
        row["attack"]: row for row in latest_comparable(read(table)) if row["defense"] == "none"
    }
    sections = [
        section(load("attack", name), name, pictures / f"{name}.png", rows.get(name))
        for name in names("attack")
    ]
    page.write_text("\n".join([INTRODUCTION.format(table=table), *sections]))


def section(attack: type[Attack], name: str, picture: Path, row: dict[str, str] | None) -> str:
    """Heading, picture and facts of one attack."""
    text, parts = split(inspect.getdoc(attack) or "")
    about = inspect.getdoc(inspect.getmodule(attack)) or ""
    lines = [f"## {name}", "", about, ""]
    if picture.exists():
        lines += [
            f"![clean, triggered, difference, poisoned]({picture.parent.name}/{picture.name})",
            "",
        ]
    lines += [text, ""] if text else []
    lines.append(f"- **Controls**: {attack.threat_model}")
    lines += [f"- **{part}**: {parts[part]}" for part in PARTS if part in parts]
    lines.append(f"- **Gate**: ASR at least {attack.min_asr:g}")
    lines.append(f"- **Measured**: {measured(row) if row else 'not run yet'}")
    return "\n".join(lines) + "\n"


def split(text: str) -> tuple[str, dict[str, str]]:
    """A docstring without its labeled sentences, and those, each on one line."""
    found = re.split(rf"^({'|'.join(PARTS)}): ", text, flags=re.MULTILINE)

    def line(words):
        return " ".join(words.split())

    return line(found[0]), {label: line(words) for label, words in zip(found[1::2], found[2::2])}


def measured(row: dict[str, str]) -> str:
    ca, asr, benign = (
        f"{float(row[name]):.3f}"
        for name in ("clean_accuracy", "attack_success_rate", "clean_accuracy_benign")
    )
    gate = "passed" if row["gate"] == "true" else "**failed**"
    return (
        f"`{row['preset']}`, seed {row['seed']}: CA {ca} (benign {benign}), ASR {asr} on"
        f" {row['n_triggered']} images; gate {gate}"
    )
