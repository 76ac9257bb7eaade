"""The stages of dvc.yaml where there is no DVC: parameters, and commands as DVC fills them in."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

import yaml

from benchmarks.suite import flags
from rnp.params.fields import iter_hyperparameters
from rnp.params.presets import render
from rnp.params.read import Loader
from rnp.params.schema import check_params
from rnp.registry import load

LEFT_OUT = ("detect", "controls", "report", "publish")


def put(params: dict, name: str, value: object) -> None:
    """Set `a.b.c` in nested dictionaries."""
    *parents, leaf = name.split(".")
    for parent in parents:
        params = params.setdefault(parent, {})
    params[leaf] = value


def parameters(
    preset: str, *, seed: int, attack: str, defenses: Sequence[str], changes: Iterable[str] = ()
) -> dict:
    """Those of `preset` with `defenses` alone; the ones that it lacks have their defaults.

    Raises: UserError for a name or a value that no stage takes.
    """
    params = yaml.load(render(preset), Loader)
    known, params["defenses"] = params["defenses"], {}
    for name in defenses:
        params["defenses"][name] = known.get(name, {})
        for key, _, _, default in (
            () if name in known else iter_hyperparameters(load("defense", name), "")
        ):
            plain = list(default) if isinstance(default, tuple) else default
            put(params, f"defenses.{name}.{key}", plain)
    params["evaluate"]["defenses"] = [*defenses]
    params |= {"seed": seed, "poison": {"attack": attack}}
    for change in changes:
        name, _, text = change.partition("=")
        put(params, name, yaml.load(text, Loader))
    check_params(params)
    return params


def lookup(name: str, values: dict) -> object:
    for part in name.split("."):
        values = values[part]
    return values


def fill(text: str, values: dict) -> str:
    """`text` with each `${name}` as DVC fills it in: a section becomes options."""

    def found(match: re.Match[str]) -> str:
        value = lookup(match[1], values)
        return shlex.join(flags(value)) if isinstance(value, dict) else str(value)

    return re.sub(r"\$\{([\w.]+)\}", found, text)


def stages(pipeline: dict, params: dict) -> dict[str, dict]:
    """`cmd`, `deps` and `outs` of each stage up to `evaluate`, by the names that DVC gives them."""

    def filled(stage: dict, values: dict) -> dict:
        paths = {key: [fill(path, values) for path in stage[key]] for key in ("deps", "outs")}
        return {"cmd": fill(stage["cmd"], values), **paths}

    found = {}
    for name, stage in pipeline.items():
        if name in LEFT_OUT:
            continue
        if "foreach" not in stage:
            found[name] = filled(stage, params)
            continue
        for key, item in lookup(stage["foreach"].strip("${}"), params).items():
            found[f"{name}@{key}"] = filled(stage["do"], params | {"key": key, "item": item})
    return found
