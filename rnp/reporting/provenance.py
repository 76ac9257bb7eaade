"""Where a number comes from: the machine and the versions that made it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from rnp.training.device import default_device


def device_name() -> str:
    """The processor and how much of it there is, or the GPU, as RNP_DEVICE chose."""
    if default_device().type == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    return f"{model}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def provenance() -> dict[str, str]:
    """The columns `device`, `version` and `torch` of what this process makes."""
    return {
        "device": device_name(),
        "version": importlib.metadata.version("rnp"),
        "torch": torch.__version__,
    }
