"""Write the page that shows every attack: its pictures, its threat model and its numbers.

`python -m tools.attack_gallery docs/attacks.md --table results/cifar10-fast/attacks.csv`, in the
folder of a finished pipeline.
"""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import cast

import click

from rnp.attacks.base import Attack
from rnp.cli.main import guard
from rnp.io.files import write_text
from rnp.params.read import read_params
from rnp.registry import load, names
from rnp.reporting.rows import NO_DEFENSE, load_current_runs
from rnp.reporting.table import Row, latest_comparable, read

PARTS = ("Drawn at random", "Source", "Differs", "Expected")
INTRODUCTION = """# Attacks

What each attack does to an image, what its attacker controls, and what was measured. The pictures \
show from top to bottom: the clean image, the image with the trigger as at test time, their \
difference times five, and the image that the training set holds in its place (attacks that poison \
no data show the clean one). The measured numbers are those of the backdoored model, before any \
defense; the rows with seconds, machine and versions are in `{table}`. The *gate* checks that the \
backdoor is real: ASR at least the value given, and CA at most 0.02 below that of a benign model \
trained alike. An attack that fails it is left out of the means over attacks.

Made by `python -m tools.attack_gallery`, from the documentation of each attack, its pictures and \
that table.
"""


@click.command()
@click.argument("page", type=click.Path(path_type=Path))
@click.option(
    "--table",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="rows of `rnp collect --defense none`",
)
@click.option(
    "--reports",
    type=click.Path(path_type=Path),
    default="reports",
    show_default=True,
    help="the report folders of a run",
)
@click.option(
    "--params",
    type=click.Path(path_type=Path),
    default="params.yaml",
    show_default=True,
    help="the parameters of that run",
)
def gallery(page: Path, table: Path, reports: Path, params: Path) -> None:
    """Copy the picture of the run's attack into the folder beside PAGE, and write PAGE anew."""
    pictures = page.with_suffix("")
    if (reports / "poison" / "run.json").exists():
        copy_picture(reports, read_params(params), pictures)
    rows = {
        row["attack"]: row for row in latest_comparable(read(table)) if row["defense"] == NO_DEFENSE
    }
    sections = [section(name, pictures / f"{name}.png", rows.get(name)) for name in names("attack")]
    write_text(page, "\n".join([INTRODUCTION.format(table=table), *sections]))


def copy_picture(reports: Path, params: dict, pictures: Path) -> None:
    """Raises: UserError when the picture was made with other parameters than `params`."""
    load_current_runs(reports, params, ("poison",))
    pictures.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(
        reports / "poison" / "triggers.png", pictures / f"{params['poison']['attack']}.png"
    )


def section(name: str, picture: Path, row: Row | None) -> str:
    """Heading, picture, documentation and numbers of one attack."""
    attack = cast("type[Attack]", load("attack", name))
    text, parts = split(inspect.getdoc(attack) or "")
    about = inspect.getdoc(inspect.getmodule(attack)) or ""
    lines = [f"## {name}", "", about, ""]
    if picture.exists():
        place = f"{picture.parent.name}/{picture.name}"
        lines += [f"![clean, triggered, difference, poisoned]({place})", ""]
    lines += [text, ""] if text else []
    lines.append(f"- **Controls**: {attack.threat_model}")
    lines += [f"- **{part}**: {parts[part]}" for part in PARTS if part in parts]
    lines.append(f"- **Gate**: ASR at least {attack.min_asr:g}")
    lines.append(f"- **Measured**: {measured(row) if row else 'not run yet'}")
    return "\n".join(lines) + "\n"


def split(text: str) -> tuple[str, dict[str, str]]:
    """A docstring without its labeled sentences, and those by their labels, each on one line."""
    pieces = re.split(rf"^({'|'.join(PARTS)}): ", text, flags=re.MULTILINE)
    lines = [" ".join(piece.split()) for piece in pieces]
    return lines[0], dict(zip(lines[1::2], lines[2::2]))


def measured(row: Row) -> str:
    """The numbers of a row, in a sentence."""
    ca = f"{float(row['clean_accuracy']):.3f}"
    asr = f"{float(row['attack_success_rate']):.3f}"
    benign = f"{float(row['clean_accuracy_benign']):.3f}"
    gate = "passed" if row["gate"] == "true" else "**failed**"
    return (
        f"`{row['preset']}`, seed {row['seed']}: CA {ca} (benign {benign}), ASR {asr} on"
        f" {row['n_triggered']} images; gate {gate}"
    )


if __name__ == "__main__":
    with guard():
        gallery()
