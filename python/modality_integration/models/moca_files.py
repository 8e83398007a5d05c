"""Scale and shift of MoCa in files: the keys of the published checkpoints, in safetensors or torch files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from mir_kernels import _checks
from modality_integration.models.calibration import is_calibrated
from modality_integration.models.decoder import find_decoder, hidden_size
from modality_integration.models.moca import NAME, add_moca, calibrated_layers, moca_of

FILE = "moca.safetensors"
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # of transformers' Trainer, beside the weights
KEY = re.compile(r"layers\.([0-9]{1,6})\.modality_layernorm(?:\.modules_to_save\.[^.]+)?\.(scale|shift)$")

Values = dict[tuple[int, str], Tensor]  # by layer and name, scale or shift


def save_moca(model: nn.Module, path: str | Path) -> Path:
    """Writes scale and shift of every layer as safetensors, under the keys of the published checkpoints.

    `path` is a .safetensors file, or a directory for moca.safetensors; keys are `model.layers.{i}.modality_layernorm.`
    and `scale` or `shift`. Sharded parameters are gathered, so every process must call it; rank 0 writes. Returns the
    file.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE
    tensors = {}
    for i, layer in enumerate(calibrated_layers(model)):
        for name, parameter in moca_of(layer).named_parameters():
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            tensors[f"model.layers.{i}.{NAME}.{name}"] = value.cpu().contiguous()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file, metadata={"format": "pt"})
    return file


def load_moca(model: nn.Module, path: str | Path) -> None:
    """Reads what `save_moca` wrote, or a published checkpoint, into `model`; adds MoCa first where there is none.

    `path` is a .safetensors or torch file, or a directory of such. Keys that end in
    `layers.{i}.modality_layernorm.{scale,shift}` are taken, whatever stands before. ValueError where layers are
    missing, left over, of another size or not finite, or where a file cannot be read; then nothing is changed.
    """
    values = _read(Path(path))
    placed = any(is_calibrated(module) for module in model.modules())
    layers = calibrated_layers(model) if placed else find_decoder(model).layers
    _check_layers(values, len(layers))
    if placed:
        scale = moca_of(layers[0]).scale
        _check_vectors(values, scale.shape[0], scale.dtype)
    else:
        _check_vectors(values, hidden_size(model, find_decoder(model)), torch.float32)
        add_moca(model)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for name, parameter in moca_of(layer).named_parameters():
                value = values[i, name].to(parameter.device, parameter.dtype)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)


def _check_layers(values: Values, count: int) -> None:
    """ValueError unless there are scale and shift for layers 0 to count - 1 and for no other."""
    expected = {(i, name) for i in range(count) for name in ("scale", "shift")}
    if set(values) != expected:
        odd = sorted(f"{i}.{name}" for i, name in set(values) ^ expected)
        raise ValueError(f"path: takes scale and shift of {count} layers; missing or left over: {', '.join(odd)}")


def _check_vectors(values: Values, size: int, dtype: torch.dtype) -> None:
    """ValueError unless every value is (size,) and finite in `dtype`."""
    wrong = sorted(f"{i}.{name}" for (i, name), value in values.items() if tuple(value.shape) != (size,))
    if wrong:
        raise ValueError(f"path: takes vectors of length {size}; of another shape: {', '.join(wrong)}")
    if wrong := sorted(f"{i}.{name}" for (i, name), value in values.items() if not value.to(dtype).isfinite().all()):
        raise ValueError(f"path: takes values that are finite in {dtype}; others in {', '.join(wrong)}")


def _read(path: Path) -> Values:
    """MoCa's tensors at `path`; ValueError where there are none, or two that differ for one layer."""
    values: Values = {}
    for files in _candidates(path):
        for file in files:
            for key, value in _tensors(file).items():
                if isinstance(key, str) and (match := KEY.search(key)):
                    _checks.floating(f"path: {key} in {file}", value)
                    place = int(match[1]), match[2]
                    if place in values and not torch.equal(values[place], value):
                        raise ValueError(f"path: {key} in {file} differs from another value of the same layer")
                    values[place] = value
        if values:
            return values
    raise ValueError(f"path: no key ending in layers.{{i}}.{NAME}.scale or .shift in {path}")


def _candidates(path: Path) -> list[list[Path]]:
    """Files to read together, then those to read where these hold no MoCa: LoRA runs keep it in a .bin beside."""
    if not path.is_dir():
        found = [[path]]
    elif (path / FILE).exists():
        found = [[path / FILE]]
    else:
        torch_files = sorted(file for file in path.glob("*.bin") if file.name not in NOT_WEIGHTS)
        found = [files for files in (sorted(path.glob("*.safetensors")), torch_files) if files]
    if not found or not found[0][0].exists():
        raise FileNotFoundError(f"path: no safetensors or torch file at {path}")
    return found


def _tensors(file: Path) -> dict[Any, Any]:
    """What a file holds under MoCa's keys, or all of it; ValueError where it is no file of tensors."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                return {key: stored.get_tensor(key) for key in stored.keys() if KEY.search(key)}  # noqa: SIM118
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except SafetensorError as error:
        raise ValueError(f"path: {file} is no readable safetensors file ({error})") from error
    except Exception as error:  # torch.load on damaged files: whatever its unpickler and zip reader raise
        raise ValueError(f"path: {file} is no readable torch file ({type(error).__name__}: {error})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"path: {file} takes a dict of tensors, got {type(loaded).__name__}")
    return loaded
