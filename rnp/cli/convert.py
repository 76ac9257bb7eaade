"""Take the weights out of an untrusted checkpoint, without running anything in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rnp.cli.help import OTHERS, GroupedCommand, out_option
from rnp.cli.options import options
from rnp.params.fields import build_from_values
from rnp.untrusted.convert import Converted
from rnp.untrusted.convert import convert as convert_file
from rnp.untrusted.limits import Limits, sanitize

HEADINGS = {
    "Limits": ("file-size", "memory", "seconds", "tensors", "elements"),
    "Options": OTHERS,
}
ARGUMENTS = {"source": "a checkpoint: .pt, .pth, .ckpt, .bin or .safetensors"}


@click.command(cls=GroupedCommand, groups=HEADINGS, arguments=ARGUMENTS)
@click.argument("source", type=click.Path(path_type=Path))
@out_option(True, "the file to write; its name ends in .safetensors")
@options(Limits)
def convert(source: Path, out: Path, **values: Any) -> None:
    """Take the weights out of SOURCE, without running anything in it.

    A file that is no safetensors file is read by PyTorch's restricted unpickler, in a process of
    its own that has no network where the system allows that. It is refused if it holds more than
    tensors.
    """
    converted = convert_file(source, out, build_from_values(Limits, values))
    for line in describe(converted, source, out):
        click.echo(sanitize(line))


def describe(converted: Converted, source: Path, out: Path) -> list[str]:
    """Lines on what was read, and in which isolation."""
    key = f", found under {converted.key!r}" if converted.key else ""
    prefix = f", prefix {converted.prefix!r} removed" if converted.prefix else ""
    lines = [
        f"{out}: {converted.tensors:,} tensors, {converted.elements:,} values{key}{prefix}",
        f"sha256 {converted.input_sha256}  {source}",
        f"sha256 {converted.output_sha256}  {out}",
    ]
    if not converted.isolation:
        return [*lines, "safetensors, read as data"]
    granted = [name for name, is_granted in converted.isolation.items() if is_granted]
    denied = [name for name, is_granted in converted.isolation.items() if not is_granted]
    lines.append(f"read in a process of its own; limits: {', '.join(granted) or 'none'}")
    return [*lines, f"not possible on this system: {', '.join(denied)}"] if denied else lines
