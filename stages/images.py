"""Stage images: write what the images of the data set are, so that changed ones are split anew."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.cli.main import guard
from rnp.cli.prepare import data_root
from rnp.io.files import write_json
from rnp.params.fields import from_section
from rnp.params.read import flatten, read_params
from rnp.registry import load


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="the JSON file to make")
def images(out: Path) -> None:
    """Write the name and the fingerprint of the data set in params.yaml to OUT."""
    params = read_params(Path("params.yaml"))
    name = params["data"]["name"]
    options = dict(flatten(params.get("datasets", {}).get(name) or {}))
    dataset = from_section(load("dataset", name), options)
    write_json(out, {"name": name, "fingerprint": dataset.fingerprint(data_root())})


if __name__ == "__main__":
    with guard():
        images()
