"""Read params.yaml, as nested dictionaries and as flat ones."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from rnp.errors import UserError


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
        r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
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


def flatten(tree: dict, prefix: str = "", separator: str = ".") -> Iterator[tuple[str, object]]:
    """The leaves of nested dictionaries, their names joined by `separator`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}{separator}", separator)
        else:
            yield f"{prefix}{key}", value


def params_in_use(params: dict) -> dict:
    """A copy without the options of data sets, attacks and detectors that are not chosen."""
    chosen = dict(params)
    for family, section, key in (("datasets", "data", "name"), ("attacks", "poison", "attack")):
        name = params.get(section, {}).get(key)
        members = params.get(family, {})
        chosen[family] = {name: members[name]} if name in members else {}
    detect = params.get("detect", {})
    asked = {"neural_cleanse", *detect.get("labels", ()), *detect.get("samples", ())}
    chosen["detect"] = {
        key: value for key, value in detect.items() if not isinstance(value, dict) or key in asked
    }
    return chosen
