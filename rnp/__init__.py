"""Find and remove backdoors in image classifiers: `from rnp import RNP, purify`.

The names below are imported when they are first used, so that importing `rnp` stays cheap.
"""

import importlib
from typing import TYPE_CHECKING

from rnp.training.openmp import wait_briefly

if TYPE_CHECKING:
    from rnp.defenses.rnp import RNP
    from rnp.defenses.rnp_ft import RNPFT
    from rnp.defenses.rnp_rebuild import RNPRebuild
    from rnp.io.models import load_model
    from rnp.types import DefenseSet, ImageSet
    from rnp.untrusted.audit import inspect, purify
    from rnp.untrusted.spec import ModelSpec

__all__ = [
    "RNP",
    "RNPFT",
    "DefenseSet",
    "ImageSet",
    "ModelSpec",
    "RNPRebuild",
    "inspect",
    "load_model",
    "purify",
]
_MODULES = {
    "RNP": "rnp.defenses.rnp",
    "RNPFT": "rnp.defenses.rnp_ft",
    "RNPRebuild": "rnp.defenses.rnp_rebuild",
    "DefenseSet": "rnp.types",
    "ImageSet": "rnp.types",
    "ModelSpec": "rnp.untrusted.spec",
    "inspect": "rnp.untrusted.audit",
    "load_model": "rnp.io.models",
    "purify": "rnp.untrusted.audit",
}
"""The module of each public name."""

wait_briefly()  # before PyTorch is loaded


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'rnp' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
