"""Prepare a checkout: the MLflow store, DVC without git, the schema of params.yaml."""

from __future__ import annotations

import subprocess

import click

from rnp.io.files import write_json
from rnp.params.presets import SCHEMA
from rnp.params.schema import json_schema
from rnp.tracking import store


@click.command()
def setup() -> None:
    """Run this once after installation, in the folder of dvc.yaml; repeating it does no harm."""
    config = ["dvc", "config", "--local"]
    if not prints("git", "rev-parse", "--is-inside-work-tree"):
        subprocess.run([*config, "core.no_scm", "true"], check=True)
    elif prints(*config, "core.no_scm"):
        subprocess.run([*config, "--unset", "core.no_scm"], check=True)
    write_json(SCHEMA, json_schema())
    store.setup()


def prints(*command: str) -> bool:
    """Whether a command prints anything."""
    return bool(subprocess.run(command, capture_output=True, check=False).stdout.strip())
