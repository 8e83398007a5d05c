"""Everything a result depends on: the settings in its JSON, and the arguments of a run checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from modality_integration.app.loading import processor_names
from modality_integration.app.options import ComputeOptions, RunOptions, part
from modality_integration.app.packages import installed
from modality_integration.app.samples import Sample, samples_digest

# Arguments that are not settings: fields of the result itself, and those that change only its last digits.
NOT_SETTINGS = ("outliers", "normalize", "bounds", "sinks", "device", "model_files", "processor_files", "threads")
# Packages that MIR depends on: the first two affect features, the next two the pixels that a model sees.
PACKAGES = ("torch", "transformers", "torchvision", "pillow", "mir-kernels")


def versions() -> dict[str, str | None]:
    """Versions of the packages that MIR depends on, by setting name; None for one that is not installed."""
    return {f"{package.replace('-', '_')}_version": installed(package) for package in PACKAGES}


def deciding_arguments(
    options: ComputeOptions, samples: Sequence[Sample], device: torch.device, processes: int
) -> dict[str, Any]:
    """All arguments, by option name, and package versions that the exact bits of the result depend on.

    Excludes the processor's classes, known only once it is loaded: its files and the versions determine them.
    """
    values = asdict(options)
    # `chosen_samples` identifies the data, so moving a folder changes nothing.
    for name in (*part(options, RunOptions), "protocol", "device_map", "images", "text"):
        del values[name]
    return values | {
        "text_tokens": options.prose_tokens,
        "template": options.prompt,
        "in_order": options.in_order,
        "device": device.type,
        "processes": processes,
        "dealt": "in blocks"
        if options.groups
        else None,  # how samples are assigned to groups; round-robin would form others
        "model_files": _folder_digest(options.model),
        "processor_files": _folder_digest(options.processor),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "chosen_samples": samples_digest(samples),
        **versions(),
    }


def settings_of(arguments: dict[str, Any], model: Any, processor: Any) -> dict[str, Any]:
    """The settings of a measurement, for `MIRResult.settings`."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    settings = {name: value for name, value in arguments.items() if name not in NOT_SETTINGS}
    commit = getattr(model.config, "_commit_hash", None)  # set for a model from the hub
    return settings | {"dtype": dtype, "model_commit": commit, **processor_names(processor)}


def _folder_digest(name: str | None) -> str | None:
    """A short hash of a local model's file names, sizes and times, so that no run resumes with a retrained model."""
    if name is None or not (folder := Path(name)).is_dir():
        return None
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
