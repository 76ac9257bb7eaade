"""The stages of dvc.yaml where there is no DVC: their parameters and their commands."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import yaml

from benchmarks.subprocesses import ROOT
from rnp.params.fields import iter_hyperparameters
from rnp.params.presets import render
from rnp.params.read import Loader
from rnp.params.schema import check_params
from rnp.registry import load

LEFT_OUT = ("images", "detect", "controls", "report", "publish")


@dataclass(frozen=True)
class Stage:
    """A stage of dvc.yaml, with the values of params.yaml filled in."""

    command: str
    deps: tuple[str, ...]
    outs: tuple[str, ...]

    def arguments(self) -> tuple[str, ...]:
        """The command for this Python."""
        return (sys.executable, *shlex.split(self.command)[1:])


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
    known = params["defenses"]
    params["defenses"] = {name: known.get(name) or default_options(name) for name in defenses}
    params["evaluate"]["defenses"] = [*defenses]
    params |= {"seed": seed, "poison": {"attack": attack}}
    for change in changes:
        name, _, text = change.partition("=")
        put(params, name, yaml.load(text, Loader))
    check_params(params)
    return params


def default_options(defense: str) -> dict:
    """The section of a defense in params.yaml."""
    options: dict = {}
    for key in iter_hyperparameters(load("defense", defense)):
        default = list(key.default) if isinstance(key.default, tuple) else key.default
        put(options, key.name, default)
    return options


def read_pipeline() -> dict:
    """The stages in dvc.yaml."""
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def stages(pipeline: dict, params: dict) -> dict[str, Stage]:
    """The stages up to `evaluate` without those of detection, by the names that DVC gives them."""
    filled = {}
    for name, stage in pipeline.items():
        if name in LEFT_OUT:
            continue
        if "foreach" not in stage:
            filled[name] = fill_stage(stage, params)
            continue
        for key in lookup(stage["foreach"].strip("${}"), params):
            filled[f"{name}@{key}"] = fill_stage(stage["do"], params | {"key": key})
    return filled


def fill_stage(stage: dict, values: dict) -> Stage:
    deps = tuple(fill(path, values) for path in stage["deps"])
    outs = tuple(fill(path, values) for path in stage["outs"])
    return Stage(fill(stage["cmd"], values), deps, outs)


def fill(text: str, values: dict) -> str:
    """`text` with each `${name}` replaced, as DVC does it."""
    return re.sub(r"\$\{([\w.]+)\}", lambda match: str(lookup(match[1], values)), text)


def lookup(name: str, values: dict) -> dict:
    """The value of `a.b.c` in nested dictionaries."""
    for part in name.split("."):
        values = values[part]
    return values
