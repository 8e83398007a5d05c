"""Where a run computes, and whether the metric's state fits there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from mir_kernels.ops.moments.streaming import ROWS
from modality_integration.app.errors import InputError
from modality_integration.metric.accumulator import HOLD


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU; under torchrun each process takes the GPU of its local rank."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def free_memory() -> int | None:
    """Bytes of main memory that can be had without swapping, None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def scarce_memory(model: Any, groups: int, device: torch.device) -> str | None:
    """A note where the metric's state may outgrow the free memory.

    A layer and modality has held rows; and for each group an accumulator of d (d + 1) / 2 float64 numbers with rows
    gathered for it, made once more tokens came than are held.
    """
    config = model.config.get_text_config()
    d, layers, size = config.hidden_size, config.num_hidden_layers, next(model.parameters()).element_size()
    held = max(HOLD, d + 1) * d * size
    accumulator = 4 * d * (d + 1) + ROWS.get(device.type, max(ROWS.values())) * d * size
    needed, without = (2 * layers * (held + count * accumulator) / 1e9 for count in (max(groups, 1), 1))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if free is None or needed < free / 1e9:
        return None
    return f"the covariances of every layer may take {needed:.1f} GB, and {free / 1e9:.1f} GB are free on {device}" + (
        f": --groups 0 takes {without:.1f} GB" if groups else ""
    )
