"""Take the weights out of a stranger's checkpoint, without running anything that is in it."""

from __future__ import annotations

from pathlib import Path

import click

from rnp.cli.options import options
from rnp.params.fields import build_from_values
from rnp.untrusted.convert import Converted
from rnp.untrusted.convert import convert as quarantine
from rnp.untrusted.limits import Limits, sanitize


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="what is made: a file that ends in .safetensors",
)
@options(Limits)
def convert(source: Path, out: Path, **values: object) -> None:
    """Write the weights in SOURCE (.pt, .pth, .ckpt, .bin, .safetensors) to a checked safetensors
    file.

    Other files than safetensors are read by a process of their own, without network where the
    system allows that, by torch's restricted unpickler. What asks for more than tensors is
    refused.
    """
    converted = quarantine(source, out, build_from_values(Limits, values))
    for line in describe(converted, source, out):
        click.echo(sanitize(line))


def describe(converted: Converted, source: Path, out: Path) -> list[str]:
    found = f", found under {converted.key!r}" if converted.key else ""
    prefix = f", prefix {converted.prefix!r} removed" if converted.prefix else ""
    lines = [
        f"{out}: {converted.tensors:,} tensors, {converted.elements:,} values{found}{prefix}",
        f"sha256 {converted.input_sha256}  {source}",
        f"sha256 {converted.output_sha256}  {out}",
    ]
    if not converted.isolation:
        return [*lines, "safetensors, read as data"]
    granted = [name for name, done in converted.isolation.items() if done]
    lacking = [name for name, done in converted.isolation.items() if not done]
    lines.append(f"read in a process of its own; limits: {', '.join(granted) or 'none'}")
    return [*lines, f"not possible on this system: {', '.join(lacking)}"] if lacking else lines
