"""Write one self-contained page about everything that the stages reported."""

from __future__ import annotations

from pathlib import Path

from rnp.cli.options import Files, command
from rnp.params.read import read_params
from rnp.reporting.page import page


@command("report", inputs=("reports",), seed=False, precision=False)
def report(*, files: Files) -> None:
    """Write the page to OUT; it opens offline, on a phone and in print."""
    page(files.reports, read_params(Path("params.yaml")), files.out)
