"""Help pages that begin with what is required and end with what is rarely used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

REQUIRED = "Required"
OTHERS = ()


class GroupedCommand(click.Command):
    """A command whose help page shows its parameters under headings.

    Args:
        groups: By heading, the names of options (`image-size`), or their beginnings (`unlearn.`).
            The heading with `OTHERS` gets all other options. Required parameters come first,
            under a heading of their own.
        arguments: By name, the help texts of the arguments.
    """

    def __init__(
        self,
        *args: Any,
        groups: Mapping[str, Sequence[str]],
        arguments: Mapping[str, str],
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.groups = groups
        self.arguments = arguments

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """The arguments, the required options, and `[OPTIONS]` for the others."""
        pieces = []
        for param in self.get_params(ctx):
            if isinstance(param, click.Argument):
                pieces += param.get_usage_pieces(ctx)
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and param.required:
                pieces += [param.opts[-1], param.make_metavar(ctx)]
        return [*pieces, "[OPTIONS]"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {REQUIRED: []}
        for param in sorted(self.get_params(ctx), key=self._position):
            record = self._help_record(param, ctx)
            if record:
                sections.setdefault(self._heading(param), []).append(record)
        for heading in (REQUIRED, *self.groups):
            if sections.get(heading):
                with formatter.section(heading):
                    formatter.write_dl(sections[heading])

    def _help_record(self, param: click.Parameter, ctx: click.Context) -> tuple[str, str] | None:
        if isinstance(param, click.Argument):
            return param.make_metavar(ctx), self.arguments[param.name or ""]
        record = param.get_help_record(ctx)
        if record is None:
            return None
        flags, text = record
        for needless in ("[required]", '[default: ""]'):  # the heading, and an empty text
            text = text.removesuffix(needless).rstrip()
        return flags, text

    def _heading(self, param: click.Parameter) -> str:
        if param.required:
            return REQUIRED
        fitting = [heading for heading, names in self.groups.items() if fits(param, names)]
        others = [heading for heading, names in self.groups.items() if names == OTHERS]
        return (fitting or others)[0]

    def _position(self, param: click.Parameter) -> int:
        """The order under a heading: that of the names in `groups`; arguments come first."""
        if isinstance(param, click.Argument):
            return -1
        names = [name for group in self.groups.values() for name in group]
        return next((i for i, name in enumerate(names) if fits(param, (name,))), len(names))


def fits(param: click.Parameter, names: Sequence[str]) -> bool:
    """Whether a name is that of the option or, if it ends in a dot, its beginning."""
    flags = [flag.lstrip("-") for flag in param.opts]
    return any(
        flag.startswith(name) if name.endswith(".") else flag == name
        for flag in flags
        for name in names
    )


def out_option(required: bool, help: str, **settings: Any) -> Callable:
    """The option -o/--out, whose help says what is written."""
    kind = click.Path(path_type=Path, **settings)
    return click.option("-o", "--out", type=kind, required=required, help=help)
