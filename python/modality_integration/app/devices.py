"""The device of a run, and whether the metric's state fits into its memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from modality_integration.app.errors import InputError
from modality_integration.metric.streaming import ModalityIntegrationRate


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA, else Apple's MPS, else the CPU; under torchrun each process uses the GPU of its local rank."""
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
    """Bytes of main memory available without swapping; None if the system does not report it."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def free_bytes(device: torch.device) -> int | None:
    """Bytes available for tensors on a device on top of the forward passes' peak so far; None if unknown."""
    if device.type == "cpu":
        return free_memory()
    if device.type != "cuda":
        return None
    # Memory reserved by torch is free too, except for the peak that a forward pass needs.
    kept = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def count_peaks_anew() -> None:
    """Reset the peaks that `free_bytes` uses: loading a model may need more memory than its forward passes."""
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def check_memory(metric: ModalityIntegrationRate, samples: int) -> list[str]:
    """Check whether the state of `metric`, after at least one sample, will fit into memory after all `samples`.

    Raises InputError with options that fit if a device's memory does not suffice. Returns notes if main memory may not
    suffice for the finished groups that a GPU moves there. Devices whose free memory is unknown are skipped.
    """
    to_come, groups = metric.memory_to_come(samples), metric.options.groups
    for device, needed in to_come.devices.items():
        free = free_bytes(device)
        if free is not None and needed > free:
            raise InputError(
                f"memory: judging from the samples so far, covariances and held rows need {_gb(needed)} more on "
                f"{device}, but only {_gb(free)} is free; {_what_fits(metric, samples, device, free)}; with changed "
                "arguments, add --restart"
            )
    free = free_memory()
    if free is None or to_come.host <= free:
        return []
    return [
        f"the covariances of finished groups of samples may need {_gb(to_come.host)} of main memory, but only "
        f"{_gb(free)} is free; --groups 0 needs none (no standard error), and fewer than --groups {groups} needs less"
    ]


def _what_fits(metric: ModalityIntegrationRate, samples: int, device: torch.device, free: int) -> str:
    """Options with which the state would fit on `device`, or other options to try."""

    def fits(samples: int, groups: int | None = None) -> bool:
        return metric.memory_to_come(samples, groups).devices[device] <= free

    def fits_in(host: int) -> bool:
        everything = metric.memory_to_come(samples)
        return sum(everything.devices.values()) + everything.host <= host

    fitting = []
    if metric.options.groups and fits(samples, 0):
        fitting.append(f"--groups 0 (no standard error) needs {_gb(metric.memory_to_come(samples, 0).devices[device])}")
    most = max((count for count in range(1, samples) if fits(count)), default=0)
    if most > 1:
        fitting.append(f"--samples {most * (metric.options.samples or samples) // samples} fits")
    host = free_memory()
    if device.type != "cpu" and host is not None and fits_in(host):
        fitting.append(f"--device cpu, with {_gb(host)} free (for the model as well)")
    return ", or ".join(fitting) or (
        "no smaller setting fits: load smaller weights with --dtype bfloat16, or spread them with --device-map auto"
    )


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
