"""The device and the precision of computations."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Literal

import torch
from torch import nn

from rnp.errors import UserError
from rnp.training.distributed import world_size

Precision = Literal["fp32", "bf16", "auto"]
"""Single precision; autocast to bf16; or bf16 where the hardware multiplies it natively."""
ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Environment variables that limit the instructions which oneDNN uses."""
ISA_WITHOUT_BF16 = {
    "SSE41",
    "AVX",
    "AVX2",
    "AVX2_VNNI",
    "AVX2_VNNI_2",
    "AVX512_CORE",
    "AVX512_CORE_VNNI",
}
"""Their values under which oneDNN has no native bf16 product."""


def default_device() -> torch.device:
    """`RNP_DEVICE`, else a GPU if there is one, else the CPU; under torchrun one GPU per process.

    Raises: UserError when `RNP_DEVICE` names no device of this machine.
    """
    name = os.environ.get("RNP_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and world_size() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"RNP_DEVICE={name!r} is no device of this machine; try cpu") from error


def device_of(model: nn.Module) -> torch.device:
    """The device of the parameters of `model`."""
    return next(model.parameters()).device


_chosen: ContextVar[Precision] = ContextVar("precision", default="auto")


def chosen_precision() -> Precision:
    """The precision set by the innermost `use_precision`; `auto` outside of any."""
    return _chosen.get()


@contextlib.contextmanager
def use_precision(precision: Precision) -> Iterator[None]:
    """Set the precision of all methods that run inside the block.

    Blocks nest; the precision from before the block is restored at its end, also after an
    exception. Functions with an argument `precision` (`fit`, `predict`, `score`) use their
    argument.
    """
    token = _chosen.set(precision)
    try:
        yield
    finally:
        _chosen.reset(token)


def half_precision(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bf16.

    `auto` does so where the hardware multiplies bf16 natively and no environment variable keeps
    oneDNN from using that.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    limits = {os.environ.get(name, "").upper() for name in ISA_VARIABLES}
    return torch.cpu._is_avx512_bf16_supported() and not ISA_WITHOUT_BF16 & limits


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which PyTorch computes in `precision`."""
    if half_precision(precision, device):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()
