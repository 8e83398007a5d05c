"""What a value depends on: the settings in its JSON, and the arguments that a checkpoint belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from modality_integration.app.options import ComputeOptions, RunOptions, part
from modality_integration.app.samples import Sample

# Deciding arguments that are no settings: fields of the result itself, and what changes no more than its last digits.
NOT_SETTINGS = ("outliers", "normalize", "bounds", "sinks", "device", "model_files", "threads")


def deciding_arguments(
    options: ComputeOptions, samples: Sequence[Sample], device: torch.device, processes: int
) -> dict[str, Any]:
    """What the bits of the result depend on, by the names a person typed."""
    values = asdict(options)
    # The data count by `chosen_samples`, so a moved folder does not.
    for name in (*part(options, RunOptions), "protocol", "device_map", "images", "text"):
        del values[name]
    return values | {
        "text_tokens": options.prose_tokens,
        "template": options.prompt,
        "in_order": options.in_order,
        "device": device.type,
        "processes": processes,
        "dealt": "in blocks" if options.groups else None,  # into groups; the same samples in turn are other groups
        "model_files": _model_digest(options.model),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "chosen_samples": _digest(samples),
    }


def settings_of(arguments: dict[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """What the value was measured with, for `MIRResult.settings`."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {name: value for name, value in arguments.items() if name not in NOT_SETTINGS} | {"dtype": dtype}


def _digest(samples: Sequence[Sample]) -> str:
    """A short hash of the content of every pair, in order."""
    hashed = hashlib.sha256()
    for sample in samples:
        image = sample.image.read_bytes() if isinstance(sample.image, Path) else sample.image.tobytes()
        hashed.update(hashlib.sha256(image).digest() + hashlib.sha256(sample.text.content.encode()).digest())
    return hashed.hexdigest()[:16]


def _model_digest(name: str) -> str | None:
    """A short hash of a local model's file names, sizes and times, so that a retrained one is not resumed into."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
