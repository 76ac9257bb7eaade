"""Options from dataclasses: the name of a field is its option, its annotation the type and the
help text.
"""

from __future__ import annotations

import dataclasses
import os
import typing
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from rnp.errors import UserError

PATH = click.Path(path_type=Path)


def fields(
    cls: type, prefix: str = "", like: object = None
) -> Iterator[tuple[str, object, str, object]]:
    """Name, type, help text and default of each hyperparameter; those of a nested dataclass get
    its name and a dot.

    Defaults are those of `like`, an instance of `cls`, if it is given.
    """
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint, text = hints[field.name], ""
        if typing.get_origin(hint) is typing.Annotated:
            hint, text = typing.get_args(hint)
        own = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        default = own if like is None else getattr(like, field.name)
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{field.name}.", default)
        else:
            yield f"{prefix}{field.name}", hint, text, default


def options(cls: type, prefix: str = "", like: object = None) -> Callable:
    """A decorator that gives a click command one option per hyperparameter of `cls`; defaults are
    those of `like`, if given.
    """

    def decorate(command: Callable) -> Callable:
        for name, hint, text, default in reversed(list(fields(cls, prefix, like))):
            command = click.option(
                *declaration(name, hint),
                **settings(hint),
                default=default,
                help=text,
                show_default=True,
            )(command)
        return command

    return decorate


def declaration(name: str, hint: object) -> tuple[str, str]:
    """The flag as DVC writes it, and the name under which click hands the value on."""
    flag = f"--{name}/--no-{name}" if hint is bool else f"--{name}"
    return flag, argument(name)


def argument(name: str) -> str:
    return name.replace(".", "__")


def settings(hint: object) -> dict:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"type": click.Choice(args)}
    if origin is tuple:
        return {"type": args[0], "multiple": True}
    if hint in (int, float, str, bool):
        return {"type": hint}
    raise TypeError(f"no option for the annotation {hint!r}")


def build(cls: type, values: dict[str, object], prefix: str = "") -> object:
    """An instance of `cls` from the values that click collected; they are removed from `values`.

    Raises: UserError when a value is out of range.
    """
    given = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = f"{prefix}{field.name}"
        nested = dataclasses.is_dataclass(hints[field.name])
        given[field.name] = (
            build(hints[field.name], values, f"{name}.") if nested else values.pop(argument(name))
        )
    return cls(**given)


def from_section(cls: type, section: dict[str, object], prefix: str = "") -> object:
    """An instance of `cls` from the leaves of a section of params.yaml, by key; what they lack has
    its default.
    """
    given = {name: section.get(name, default) for name, _, _, default in fields(cls, prefix)}
    return build(
        cls,
        {argument(name): tuple(v) if isinstance(v, list) else v for name, v in given.items()},
        prefix,
    )


def command(
    name: str,
    *hyperparameters: type | tuple[type, str],
    inputs: tuple[str, ...] = (),
    outs: tuple[str, ...] = ("out",),
    seed: bool = True,
    parallel: bool = False,
) -> Callable:
    """A stage as a click command.

    The function is called with the inputs and outputs as paths, `seed`, `report`, and one instance
    of each class in `hyperparameters` (with a prefix where a tuple gives one), in that order.
    Under torchrun only those run that are `parallel`.
    """

    def decorate(function: Callable) -> click.Command:
        pairs = [h if isinstance(h, tuple) else (h, "") for h in hyperparameters]

        def run(**values: object) -> None:
            if not parallel and "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
                raise UserError(f"{name} is no work for several processes; run it without torchrun")
            built = [build(cls, values, prefix) for cls, prefix in pairs]
            function(*built, **values)

        run.__doc__ = function.__doc__
        for cls, prefix in reversed(pairs):
            run = options(cls, prefix)(run)
        if seed:
            run = click.option(
                "--seed",
                type=int,
                default=0,
                show_default=True,
                help="where all random numbers come from",
            )(run)
        run = click.option(
            "--report", type=PATH, required=True, help="folder for metrics, history and figures"
        )(run)
        for out in reversed(outs):
            run = click.option(f"--{out}", type=PATH, required=True, help="what this stage makes")(
                run
            )
        for read in reversed(inputs):
            run = click.option(
                f"--{read}",
                type=click.Path(path_type=Path, exists=True),
                required=True,
                help="what an earlier stage made",
            )(run)
        made = click.command(name)(run)
        made.work = function  # for those who have the options already
        made.parallel = parallel
        return made

    return decorate


def generator(seed: int, stage: str) -> "torch.Generator":
    """The random numbers of one stage: different for every stage, the same for every run with this
    seed.
    """
    import hashlib

    import torch

    digest = hashlib.sha256(f"{seed}/{stage}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
