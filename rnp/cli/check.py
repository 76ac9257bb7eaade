"""Check params.yaml against the options of every command: unknown keys, wrong types, values out of
range.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import yaml

from rnp.errors import UserError
from rnp.registry import names, suggest


class Loader(yaml.SafeLoader):
    """YAML 1.2 numbers and booleans, as DVC reads them: `1e-3` is a float, `off` a word."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":float", ":bool"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|false|True|False|TRUE|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def read_params(path: Path) -> dict:
    """The parameters as nested dictionaries.

    Raises: UserError when the file is missing or no YAML mapping.
    """
    try:
        params = yaml.load(path.read_text(), Loader)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `rnp preset demo > {path}` writes one") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(params, dict):
        raise UserError(f"{path} must be a mapping of sections; `rnp preset demo` prints one")
    return params


def sections() -> dict[str, list[tuple[type, str]]]:
    """For each section of params.yaml the classes whose fields are its keys, with their
    prefixes.
    """
    from rnp.cli.choice import ChooseAttack, ChooseSet
    from rnp.cli.controls import Controls
    from rnp.cli.detect import Detect, detectors
    from rnp.cli.evaluate import Evaluate
    from rnp.data.base import Split
    from rnp.models.build import Architecture
    from rnp.prune import Prune
    from rnp.recover import Recover
    from rnp.registry import load
    from rnp.training import Train
    from rnp.unlearn import Unlearn

    def family(name: str) -> list[tuple[type, str]]:
        return [(load(name, method), f"{method}.") for method in names(name)]

    return {
        "data": [(ChooseSet, ""), (Split, "")],
        "datasets": family("dataset"),
        "model": [(Architecture, "")],
        "train": [(Train, "")],
        "poison": [(ChooseAttack, "")],
        "attacks": family("attack"),
        "unlearn": [(Unlearn, "")],
        "recover": [(Recover, "")],
        "prune": [(Prune, "")],
        "defences": family("defence"),
        "detect": [(Detect, ""), *detectors()],
        "controls": [(Controls, "")],
        "evaluate": [(Evaluate, "")],
    }


def leaves(tree: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def check_params(params: dict) -> None:
    """Raises: UserError naming the first key or value that no command takes."""
    from rnp.cli.options import argument, build, fields, settings

    known = sections()
    for section in params:
        if section not in ("seed", "preset") and section not in known:
            raise UserError(
                f"params.yaml: unknown section {section!r}{suggest(section, ['seed', *known])}"
            )
    if not isinstance(params.get("seed"), int):
        raise UserError(f"params.yaml: seed must be a whole number, got {params.get('seed')!r}")
    for section, classes in known.items():
        if not isinstance(params.get(section), dict):
            raise UserError(
                f"params.yaml: section {section!r} is missing; `rnp preset demo` prints a complete"
                " file"
            )
        given = dict(leaves(params[section]))
        values = {}
        hints = {name: hint for cls, prefix in classes for name, hint, _, _ in fields(cls, prefix)}
        for cls, prefix in classes:
            values |= {argument(name): default for name, _, _, default in fields(cls, prefix)}
        for key, value in given.items():
            if key not in hints:
                raise UserError(
                    f"params.yaml: unknown key {section}.{key}{suggest(key, list(hints))}"
                )
            values[argument(key)] = convert(f"{section}.{key}", value, settings(hints[key]))
        for cls, prefix in classes:
            try:
                build(cls, values, prefix)
            except UserError as error:
                raise UserError(f"params.yaml: {section}: {error}") from None
    defences, evaluated = set(params["defences"]), set(params["evaluate"].get("defences", []))
    if defences != evaluated:
        raise UserError(
            f"params.yaml: evaluate.defences names {sorted(evaluated)}, but the sections under"
            f" defences are {sorted(defences)}; make them agree"
        )


def convert(key: str, value: object, how: dict) -> object:
    """`value` as the option takes it."""
    multiple = how.get("multiple", False)
    if multiple != isinstance(value, list):
        raise UserError(
            f"params.yaml: {key} must be {'a list' if multiple else 'one value'}, got {value!r}"
        )
    if how["type"] is not bool and (isinstance(value, bool) or value is None):
        raise UserError(
            f"params.yaml: {key} must be {getattr(how['type'], '__name__', 'one of its choices')},"
            f" got {value!r}"
        )
    kind = click.types.convert_type(how["type"])
    try:
        return (
            tuple(kind.convert(v, None, None) for v in value)
            if multiple
            else kind.convert(value, None, None)
        )
    except click.UsageError as error:
        raise UserError(f"params.yaml: {key}: {error.message}") from None


@click.command()
@click.argument("params", type=click.Path(path_type=Path), default="params.yaml")
def check(params: Path) -> None:
    """Check PARAMS (params.yaml) and say what is wrong with it, or nothing."""
    check_params(read_params(params))
