"""Where and in which arithmetic to compute."""

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
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
FORGONE = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""What a limit may say that leaves oneDNN no native product of bf16."""


def default_device() -> torch.device:
    """`RNP_DEVICE`, else a GPU when there is one (under torchrun one for each process), else the
    CPU.

    Raises: UserError when `RNP_DEVICE` names no device of this machine.
    """
    wanted = os.environ.get("RNP_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and world_size() > 1:
        wanted = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"RNP_DEVICE={wanted!r} is no device of this machine; try cpu") from error


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


_chosen: ContextVar[Precision] = ContextVar("precision", default="auto")


def chosen_precision() -> Precision:
    """The arithmetic of training and of most forward passes: `auto`, or what `use_precision` says."""
    return _chosen.get()


@contextlib.contextmanager
def use_precision(precision: Precision) -> Iterator[None]:
    """Let everything in the block compute in `precision`, as `torch.autocast` does for one pass."""
    token = _chosen.set(precision)
    try:
        yield
    finally:
        _chosen.reset(token)


def half_precision(precision: Precision, device: torch.device) -> bool:
    """Whether to compute in bf16; `auto` does where the hardware multiplies it natively, and
    oneDNN has not been told to forgo that.
    """
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() and not FORGONE & {
        os.environ.get(name, "").upper() for name in LIMITS
    }


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager:
    on = half_precision(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16) if on else contextlib.nullcontext()
