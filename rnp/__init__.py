"""Remove backdoors from image classifiers. In a notebook: `from rnp import purify, inspect`."""

from rnp.openmp import wait_briefly

wait_briefly()


def __getattr__(name: str) -> object:
    if name in ("purify", "inspect"):
        from rnp.cli import examination  # PyTorch is loaded when it is needed

        return getattr(examination, name)
    raise AttributeError(f"module 'rnp' has no attribute {name!r}")
