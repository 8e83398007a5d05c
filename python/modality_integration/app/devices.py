"""Where a run computes, and whether the metric's state fits there."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from modality_integration.app.errors import InputError
from modality_integration.metric.streaming import ModalityIntegrationRate


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU; under torchrun each process takes the GPU of its local rank."""
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device, dtype=torch.float32)
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
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a device beside the model's passes so far, None where it does not say."""
    if device.type == "cpu":
        return free_memory()
    if device.type != "cuda":
        return None
    # What torch keeps for itself is free too, but for what a pass takes and gives back.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def count_peaks_anew() -> None:
    """The peaks that `free_bytes` goes by are those from now on: loading a model may take more than its passes."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def check_memory(metric: ModalityIntegrationRate, samples: int) -> list[str]:
    """Whether the state of `metric`, which has counted a sample or more, will fit once it has counted `samples`.

    InputError where it will not fit on a device, with what would; notes where the host's memory may be short for what a
    GPU's finished groups leave there. Nothing is said of a device whose free memory is not known.
    """
    to_come, groups = metric.memory_to_come(samples), metric.options.groups
    for device, needed in to_come.devices.items():
        free = free_bytes(device)
        if free is not None and needed > free:
            raise InputError(
                f"memory: going by the samples so far, covariances and held rows will take {_gb(needed)} more on "
                f"{device}, where {_gb(free)} are free; {_what_fits(metric, samples, device, free)}; with changed "
                "arguments add --restart"
            )
    free = free_memory()
    if free is None or to_come.host <= free:
        return []
    return [
        f"the covariances of finished groups of samples may take {_gb(to_come.host)} of main memory, where {_gb(free)} "
        f"are free: --groups 0 takes none (no standard error), fewer than --groups {groups} take less"
    ]


def _what_fits(metric: ModalityIntegrationRate, samples: int, device: torch.device, free: int) -> str:
    """Options with which the state would fit on `device`, or what else there is to try."""

    def fits(samples: int, groups: int | None = None) -> bool:
        return metric.memory_to_come(samples, groups).devices[device] <= free

    def fits_in(host: int) -> bool:
        everything = metric.memory_to_come(samples)
        return sum(everything.devices.values()) + everything.host <= host

    fitting = []
    if metric.options.groups and fits(samples, 0):
        fitting.append(f"--groups 0 (no standard error) takes {_gb(metric.memory_to_come(samples, 0).devices[device])}")
    most = max((count for count in range(1, samples) if fits(count)), default=0)
    if most > 1:
        fitting.append(f"--samples {most * (metric.options.samples or samples) // samples} fit")
    host = free_memory()
    if device.type != "cpu" and host is not None and fits_in(host):
        fitting.append(f"--device cpu, where {_gb(host)} are free for the model as well")
    return ", or ".join(fitting) or (
        "nothing less would fit: load the weights smaller with --dtype bfloat16, or spread them with --device-map auto"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
