"""Scale and shift of MoCa in files: the keys of the published checkpoints, in safetensors or torch files."""

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
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # of transformers' Trainer, beside the weights
# Layers go by other names in a few families (Kimi-VL's and Molmo's blocks), and wrappers stand among the names.
_WRAPPERS = r"(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|modules_to_save\.[^.]+)"
KEY = re.compile(rf"\.([0-9]{{1,6}})\.(?:{_WRAPPERS}\.)*modality_layernorm(?:\.{_WRAPPERS})*\.(scale|shift)$")

Values = dict[tuple[int, str], Tensor]  # by layer and name, scale or shift


def save_moca(model: nn.Module, path: str | Path) -> Path:
    """Writes scale and shift of every layer as safetensors, under the keys of the published checkpoints.

    `path` is a .safetensors file, or a directory for moca.safetensors; keys are `model.layers.{i}.modality_layernorm.`
    and `scale` or `shift`. Parameters are gathered from wherever FSDP, DeepSpeed or accelerate's offloading has put
    them; where DeepSpeed trains float32 copies, those are written. Under torch.distributed every process must call it:
    rank 0 writes, in one step, and all return the file once it is there, or all raise what went wrong in one of them.
    ValueError where a layer's vectors are not of its length d, before anything is written.
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
    """Reads what `save_moca` wrote, or a published checkpoint, into `model`; adds MoCa first where there is none.

    `path` is a .safetensors or torch file, or a directory of such. Keys that end in
    `.{i}.modality_layernorm.{scale,shift}` are taken, whatever stands before: `model.layers` in published ones, what
    transformers makes of a model's names in its own. Parameters may lie wherever `save_moca` finds them, and the
    float32 copies in DeepSpeed's optimizer are loaded too. Where processes hold parts of them, every process must call
    it, and rank 0 reads `path` for all. ValueError where layers are missing, left over, of another size or not finite,
    where a file cannot be read, or where values would not stay once loaded; then nothing is changed, in any process.
    RuntimeError where a layer, read back, does not hold what was loaded.
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
                f"path: was read, but layers {', '.join(map(str, failed))} of model do not hold its values afterwards"
            )


def _check_whole(modules: list[MoCa], vectors: list[dict[str, Tensor]]) -> None:
    """ValueError unless every layer's scale and shift are there, and (d,)."""
    for i, (moca, found) in enumerate(zip(modules, vectors, strict=True)):
        size = moca.hidden_size
        for name in ("scale", "shift"):
            if name not in found or tuple(found[name].shape) != (size,):
                got = f"shape {tuple(found[name].shape)}" if name in found else "none"
                raise ValueError(
                    f"model: takes a {name} of shape ({size},) in every layer's MoCa, got {got} in layer {i}: it is in "
                    "parts that cannot be gathered from here; give the outermost wrapper (FSDP's), not what it wraps"
                )


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
    raise ValueError(f"path: no key ending in .{{i}}.{NAME}.scale or .shift in {path}")


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
