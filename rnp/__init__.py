"""Remove backdoors from image classifiers. In a notebook: `from rnp import purify, inspect`."""

from rnp.training.openmp import wait_briefly

wait_briefly()


def __getattr__(name: str) -> object:
    if name in ("purify", "inspect"):
        from rnp.untrusted import audit  # PyTorch is loaded when it is needed

        return getattr(audit, name)
    raise AttributeError(f"module 'rnp' has no attribute {name!r}")
