"""Saves and loads MoCa's scale and shift: safetensors or torch files with the keys of the published checkpoints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mir_kernels import _checks
from mir_kernels.ops.moca import MoCa
from modality_integration.metric.files import written_whole
from modality_integration.models.agreement import all_or_none, from_first
from modality_integration.models.calibration import is_calibrated
from modality_integration.models.decoder import find_decoder, hidden_size
from modality_integration.models.moca import NAME, add_moca, calibrated_layers, moca_of
from modality_integration.models.placement import in_parts, is_first_process, read_whole, why_not_writable, write_whole

FILE = "moca.safetensors"
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # saved by Trainer next to the weights
# A few families use another name for their layers (Kimi-VL's and Molmo's blocks), and wrappers add names.
_WRAPPERS = r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|modules_to_save\.[^.]+)"
KEY = re.compile(rf"\.([0-9]{{1,6}})\.(?:{_WRAPPERS}\.)*modality_layernorm(?:\.{_WRAPPERS})*\.(scale|shift)$")

Values = dict[tuple[int, str], Tensor]  # by layer and name, scale or shift


def save_moca(model: nn.Module, path: str | Path) -> Path:
    """Writes the scale and shift of every layer as safetensors, under the keys of the published checkpoints.

    `path` is a .safetensors file, or a directory for moca.safetensors; keys are `model.layers.{i}.modality_layernorm.`
    followed by `scale` or `shift`. Parameters are gathered from FSDP, DeepSpeed and accelerate's offloading; if
    DeepSpeed trains float32 copies, those are written. Under torch.distributed every process must call it: rank 0
    writes the file atomically, and all processes return its path once it exists, or all raise if any of them fails.
    ValueError if a layer's vectors do not have its length d, before anything is written.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE
    with all_or_none():
        modules = [moca_of(layer) for layer in calibrated_layers(model)]
    vectors = read_whole(model, modules)
    with all_or_none():
        _check_whole(modules, vectors)
    with all_or_none():
        if is_first_process():
            keys = {f"model.layers.{i}.{NAME}.{n}": v for i, named in enumerate(vectors) for n, v in named.items()}
            file.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(file) as partial:
                save_file(keys, partial, metadata={"format": "pt"})
    return file


def load_moca(model: nn.Module, path: str | Path) -> None:
    """Loads a file of `save_moca`, or a published checkpoint, into `model`; adds MoCa first if there is none.

    `path` is a .safetensors or torch file, or a directory of such files. All keys that end in
    `.{i}.modality_layernorm.{scale,shift}` are loaded, whatever their prefix: `model.layers` in published checkpoints,
    a renamed one in those that transformers writes. Parameters may be distributed or offloaded as in `save_moca`, and
    the float32 copies in DeepSpeed's optimizer are loaded too. If processes hold parts of them, every process must call
    it, and rank 0 reads `path` for all. ValueError if layers are missing or unexpected, or have the wrong size or
    non-finite values, if a file cannot be read, or if loaded values would not persist; then nothing is changed in any
    process. RuntimeError if a layer does not hold the loaded values when read back.
    """
    layers = [module for module in model.modules() if is_calibrated(module)]
    together = bool(layers) and in_parts(model, [moca_of(layer) for layer in layers])
    values: Values = {}
    with all_or_none(together):
        if not together or is_first_process():
            values = _read(Path(path))
            _check_layers(values, len(layers or find_decoder(model).layers))
    values = from_first(values) if together else values
    if not layers:
        _check_vectors(values, hidden_size(model, find_decoder(model)), torch.float32)
        add_moca(model)
        layers = calibrated_layers(model)
    modules = [moca_of(layer) for layer in layers]
    with all_or_none(together):
        if reason := why_not_writable(model, modules):
            raise ValueError(reason)
    before = read_whole(model, modules)
    with all_or_none(together):
        _check_whole(modules, before)
        _check_vectors(values, modules[0].hidden_size, before[0]["scale"].dtype)
    failed = write_whole(model, modules, [{n: values[i, n] for n in ("scale", "shift")} for i in range(len(modules))])
    with all_or_none(together):
        if failed:
            raise RuntimeError(
                f"path: was read, but layers {', '.join(map(str, failed))} of the model do not hold its values after "
                "loading"
            )


def _check_whole(modules: list[MoCa], vectors: list[dict[str, Tensor]]) -> None:
    """Raises ValueError unless every layer has a scale and a shift of shape (d,)."""
    for i, (moca, found) in enumerate(zip(modules, vectors, strict=True)):
        size = moca.hidden_size
        for name in ("scale", "shift"):
            if name not in found or tuple(found[name].shape) != (size,):
                got = f"shape {tuple(found[name].shape)}" if name in found else "none"
                raise ValueError(
                    f"model: expected a {name} of shape ({size},) in every layer's MoCa, got {got} in layer {i}: its "
                    "shards cannot be gathered from here; pass the outermost (FSDP) wrapper, not the wrapped model"
                )


def _check_layers(values: Values, count: int) -> None:
    """Raises ValueError unless there are a scale and a shift for exactly the layers 0 to count - 1."""
    expected = {(i, name) for i in range(count) for name in ("scale", "shift")}
    if set(values) != expected:
        odd = sorted(f"{i}.{name}" for i, name in set(values) ^ expected)
        raise ValueError(f"path: expected scale and shift of {count} layers; missing or unexpected: {', '.join(odd)}")


def _check_vectors(values: Values, size: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless every value has shape (size,) and is finite in `dtype`."""
    wrong = sorted(f"{i}.{name}" for (i, name), value in values.items() if tuple(value.shape) != (size,))
    if wrong:
        raise ValueError(f"path: expected vectors of length {size}; wrong shape: {', '.join(wrong)}")
    if wrong := sorted(f"{i}.{name}" for (i, name), value in values.items() if not value.to(dtype).isfinite().all()):
        raise ValueError(f"path: expected values that are finite in {dtype}; not finite: {', '.join(wrong)}")


def _read(path: Path) -> Values:
    """MoCa's tensors at `path`; ValueError if there are none, or two different ones for the same layer."""
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
    raise ValueError(f"path: no key ending in .{{i}}.{NAME}.scale or .shift in {path}")


def _candidates(path: Path) -> list[list[Path]]:
    """Lists of files to read together, tried in order until one holds MoCa: LoRA runs keep it in a separate .bin."""
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
    """The tensors of a file (of a safetensors file, only MoCa's); ValueError if it is not a file of tensors."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as stored:
                return {key: stored.get_tensor(key) for key in stored.keys() if KEY.search(key)}  # noqa: SIM118
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except SafetensorError as error:
        raise ValueError(f"path: {file} is not a readable safetensors file ({error})") from error
    except Exception as error:  # on damaged files, torch.load raises any error of its unpickler and zip reader
        raise ValueError(f"path: {file} is not a readable torch file ({type(error).__name__}: {error})") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"path: expected a dict of tensors in {file}, got {type(loaded).__name__}")
    return loaded
