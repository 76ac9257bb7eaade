"""Prepare a checkout: the MLflow store, DVC without git, the schema that editors read."""

from __future__ import annotations

import subprocess

import click

from rnp.io.files import write_json
from rnp.params.presets import SCHEMA
from rnp.params.schema import json_schema
from rnp.tracking import store


@click.command()
def setup() -> None:
    """Run once after installation, in the folder of dvc.yaml; running it again changes nothing."""
    inside = (
        subprocess.run(
            ["git", "rev-parse", "--is-inside-work-tree"], capture_output=True, check=False
        ).returncode
        == 0
    )
    local = ["dvc", "config", "--local"]
    if not inside:
        subprocess.run([*local, "core.no_scm", "true"], check=True)
    elif subprocess.run([*local, "core.no_scm"], capture_output=True, check=False).stdout.strip():
        subprocess.run([*local, "--unset", "core.no_scm"], check=True)
    write_json(SCHEMA, json_schema())
    store.setup()
