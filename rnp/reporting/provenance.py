"""Where a number comes from: the machine and the versions that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from rnp.training.device import default_device

CPU_INFO = Path("/proc/cpuinfo")


def device_name() -> str:
    """The GPU, or the processor and how many of its threads are used, as RNP_DEVICE chose."""
    if default_device().type == "cuda":
        return torch.cuda.get_device_name()
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    models = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    model = next(models, platform.processor())
    return f"{model}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def provenance() -> dict[str, str]:
    """The columns `device`, `version` and `torch` of a row that this process makes."""
    return {
        "device": device_name(),
        "version": importlib.metadata.version("rnp"),
        "torch": torch.__version__,
    }
