"""Puts MoCa (section 3.4 of the MIR paper) into a vision-language model, at the end of every decoder layer."""

from __future__ import annotations

import re
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules import module as torch_module

from mir_kernels import _checks
from mir_kernels.moca import MoCa
from modality_integration import seam
from modality_integration.decoder import Decoder, Layers, find_decoder, parameter_device, text_config
from modality_integration.masks import ForwardPass, ForwardWatch

# The submodule's name on each decoder layer and the checkpoint keys are those of the published checkpoints.
NAME = "modality_layernorm"
FILE = "moca.safetensors"
NOT_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # of transformers' Trainer, beside the weights
KEY = re.compile(r"layers\.([0-9]{1,6})\.modality_layernorm(?:\.modules_to_save\.[^.]+)?\.(scale|shift)$")


@dataclass(frozen=True)
class MoCaSite:
    """One decoder layer's MoCa: the layer's name, the vector length, and the norm that reads its output next.

    plain: None where the layer's last addition, MoCa and that norm are one operation, else what keeps them apart.
    """

    layer: str
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    read_by: str | None
    plain: str | None


@dataclass(frozen=True)
class MoCaReport:
    """What `add_moca` placed where, one site a decoder layer."""

    sites: tuple[MoCaSite, ...]

    def __str__(self) -> str:
        lines = [f"MoCa at the end of {len(self.sites)} decoder layers"]
        for s in self.sites:
            how = f"fused with {s.read_by}" if s.plain is None else f"read by {s.read_by}, plain: {s.plain}"
            lines.append(f"{s.layer}: {s.hidden_size} {s.dtype} on {s.device}, {how}")
        return "\n".join(lines)


def add_moca(
    model: nn.Module,
    *,
    std: float = 0.0,
    dtype: torch.dtype | None = None,
    layers: Layers = None,
    vision_mask: str | None = None,
    fused: bool = True,
) -> MoCaReport:
    """h <- scale * h + shift on the vision tokens of every decoder layer's output (Eq. 5 of the MIR paper).

    Each layer gets a submodule `modality_layernorm` with `scale` and `shift`, (d,) each: ones and zeros, or drawn from
    normal(1, std) and normal(0, std). `dtype` is theirs: float32 unless given (float64 in a float64 model). Keep it so
    in a bf16 model too: steps of 1e-3 do not move a bf16 scale of 1, hence a warning. `layers` and `vision_mask` (the
    name of a forward argument) are as in `capture`; for a mask that the caller holds, run the model inside
    `vision_tokens`.

    The vision tokens are read from the model's own marker once a forward pass. Decoding steps and passes without an
    image do nothing; only where gradients are synchronised between processes do the latter touch the parameters, with
    gradients of zero, because every process has to have them. Add MoCa before DDP, `fully_shard` or torch.compile, and
    on either side of PEFT: before `get_peft_model`, name `modality_layernorm` in its `modules_to_save`, or PEFT
    freezes it. `fully_shard` wants one dtype a group: shard each `modality_layernorm` as a group of its own.

    `fused`: where a layer has Llama's form (Llama, Qwen2, Qwen3, Mistral and the decoders of Qwen-VL are), its last
    addition, MoCa and the RMSNorm that reads the sum run as one `add_moca_rms_norm`; the report says which layers do
    and what keeps the others plain. Gemma's norms round in another order, so Gemma stays plain. The sum has the same
    bits either way, its norm may differ in the last place of its dtype (see add_moca_rms_norm). The plain way is taken
    in passes where the fused one would not be the same: under gradient checkpointing, torch.compile and FSDP, with
    `output_hidden_states` or hooks of others on a layer while gradients are recorded, in autocast, in inference mode.
    Errors: ValueError for a model that has MoCa, and as `capture` has for models without vision tokens; TypeError for
    a dtype that is not floating.
    """
    if not std >= 0:
        raise ValueError(f"std: takes a number >= 0, got {std!r}")
    if dtype is not None:
        _check_dtype(dtype)
    decoder = find_decoder(model, layers)
    _refuse_sharded(model)
    if any(hasattr(layer, NAME) for layer in decoder.layers):
        raise ValueError("model: has MoCa already; remove_moca first")
    hidden_size = _hidden_size(model, decoder)
    modules = [_module_for(layer, hidden_size, std, dtype) for layer in decoder.layers]
    named = ("output_hidden_states", *((vision_mask,) if vision_mask else ()))
    calibration = _Calibration(ForwardWatch(model, decoder, named=named), vision_mask)
    plain = [seam.why_plain(model, decoder, i) if fused else "asked for" for i in range(len(decoder.layers))]
    sites = []
    layer: Any
    for i, (layer, name, module) in enumerate(zip(decoder.layers, decoder.names, modules, strict=True)):
        layer.add_module(NAME, module)
        layer._moca = calibration
        calibration.handles.append(layer.register_forward_hook(calibration.apply))
        read_by, scale = seam.reader_of(decoder, i)[0], module.scale
        sites.append(MoCaSite(name, hidden_size, scale.dtype, scale.device, read_by, plain[i]))
    if not all(plain):
        calibration.seams = seam.place(decoder, plain, NAME, calibration)
    return MoCaReport(tuple(sites))


def remove_moca(model: nn.Module) -> None:
    """Takes MoCa and its hooks out of `model`; ValueError if there is none."""
    for layer in _calibrated_layers(model):
        layer._moca.remove()
        del layer._moca, layer._modules[NAME]


def moca_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scale and shift of every layer, for an optimizer group with weight_decay 0.

    transformers' Trainer leaves them out of weight decay by itself: it does so for every name with `layernorm` in it.
    """
    return [p for layer in _calibrated_layers(model) for p in _module(layer).parameters()]


@contextmanager
def vision_tokens(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Inside the block, MoCa in `model` goes by `mask`, (B, T) nonzero at vision tokens, not by the model's marker."""
    calibration = _calibrated_layers(model)[0]._moca
    before, calibration.given = calibration.given, mask
    try:
        yield
    finally:
        calibration.given = before


def save_moca(model: nn.Module, path: str | Path) -> Path:
    """Writes scale and shift of every layer as safetensors, under the keys of the published checkpoints.

    `path` is a .safetensors file, or a directory for moca.safetensors; keys are `model.layers.{i}.modality_layernorm.`
    and `scale` or `shift`. Sharded parameters are gathered, so every process must call it; rank 0 writes. Returns the
    file.
    """
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / FILE
    tensors = {}
    for i, layer in enumerate(_calibrated_layers(model)):
        for name, parameter in _module(layer).named_parameters():
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
    placed = any(hasattr(m, "_moca") for m in model.modules())
    layers = _calibrated_layers(model) if placed else find_decoder(model).layers
    expected = {(i, name) for i in range(len(layers)) for name in ("scale", "shift")}
    if set(values) != expected:
        odd = sorted(f"{i}.{name}" for i, name in set(values) ^ expected)
        raise ValueError(f"path: takes scale and shift of {len(layers)} layers; missing or left over: {', '.join(odd)}")
    hidden_size = _module(layers[0]).scale.shape[0] if placed else _hidden_size(model, find_decoder(model))
    wrong = sorted(f"{i}.{name}" for (i, name), value in values.items() if tuple(value.shape) != (hidden_size,))
    if wrong:
        raise ValueError(f"path: takes vectors of length {hidden_size}; of another shape: {', '.join(wrong)}")
    dtype = _module(layers[0]).scale.dtype if placed else torch.float32
    if wrong := sorted(f"{i}.{name}" for (i, name), value in values.items() if not value.to(dtype).isfinite().all()):
        raise ValueError(f"path: takes values that are finite in {dtype}; others in {', '.join(wrong)}")
    if not placed:
        add_moca(model)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            for name, parameter in _module(layer).named_parameters():
                value = values[i, name].to(parameter.device, parameter.dtype)
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                parameter.copy_(value)


class _Calibration:
    """What the MoCa hooks of one model share: its watch, and the mask of each forward pass."""

    def __init__(self, watch: ForwardWatch, given: str | None) -> None:
        self.watch = watch
        self.given: Tensor | str | None = given
        self.handles: list[Any] = []
        self.seams: list[seam.Seam] = []
        # Masks of passes that may yet be recomputed in backward, for checkpoints that wrap a layer with its hooks.
        self._replayable: deque[Tensor] = deque(maxlen=64)
        self._replayed = False

    def remove(self) -> None:
        self.watch.remove()
        for handle in self.handles:
            handle.remove()
        for placed in self.seams:
            placed.remove()
        self.handles.clear()
        self.seams.clear()

    def apply(self, layer: nn.Module, args: tuple, output: Any) -> Any:
        """Forward hook of a decoder layer."""
        state = output[0] if isinstance(output, tuple) else output
        if state.shape[-2] == 1:  # a decoding step
            return None
        if self.watch.running is not None and seam.made(self.watch.running.found, state):
            return None
        mask = self.mask(layer, state)
        if mask is None:
            return None
        module = getattr(layer, NAME)
        # A module sharded on its own is handed views of its inputs by FSDP, which autograd does not let it overwrite.
        inplace = not module._forward_pre_hooks and self._sees_first(layer) and _may_overwrite(state, args)
        state = module(state, mask, inplace=inplace)
        return (state, *output[1:]) if isinstance(output, tuple) else state

    def _sees_first(self, layer: Any) -> bool:
        """Whether no hook of others has seen the layer's output: it may have kept it."""
        first = next(iter(layer._forward_hooks.values()))
        return not torch_module._global_forward_hooks and getattr(first, "__self__", None) is self

    def mask(self, layer: nn.Module, state: Tensor) -> Tensor | None:
        """(B, T) bool, True at vision tokens, where `state` (B, T, d) lies; None where there is nothing to do."""
        shape, running = (state.shape[0], state.shape[1]), self.watch.running
        if running is None:
            return self._mask_outside(shape).to(state.device)
        if "vision" not in running.found:
            vision = running.vision(shape, self.given)
            running.found["idle"] = not torch.compiler.is_compiling() and not bool(vision.any())
            running.found["vision"] = vision
            self._remember(running, vision)
        if running.found["idle"] and not _needed_by_others(layer):
            return None
        if running.found["vision"].device != state.device:
            running.found["vision"] = running.found["vision"].to(state.device)
        return running.found["vision"]

    def _remember(self, running: ForwardPass, vision: Tensor) -> None:
        if torch.compiler.is_compiling() or not running.differentiable:
            return
        if self._replayed:
            self._replayable.clear()
            self._replayed = False
        self._replayable.append(vision.clone())  # what is known of a mask, 16 bytes a token, goes with the pass

    def _mask_outside(self, shape: tuple[int, int]) -> Tensor:
        if isinstance(self.given, Tensor):
            if tuple(self.given.shape) != shape:
                raise ValueError(f"mask: takes one entry per token, shape {shape}, got {tuple(self.given.shape)}")
            return self.given != 0
        if torch._C._current_graph_task_id() == -1:  # not inside backward
            raise RuntimeError(
                "MoCa: a decoder layer ran outside a forward pass of the model, so its vision tokens are not known; "
                "run the model that add_moca was given, or use vision_tokens"
            )
        self._replayed = True
        masks = [mask for mask in self._replayable if tuple(mask.shape) == shape]
        if not masks or not all(torch.equal(masks[0], mask) for mask in masks[1:]):
            raise RuntimeError(
                "MoCa: a checkpoint around whole decoder layers is recomputed after several forward passes and does "
                "not say which; run backward after each pass, or use the model's own gradient checkpointing"
            )
        return masks[0]


def _needed_by_others(layer: nn.Module) -> bool:
    """Whether other processes wait for this one to use the layer's MoCa: to gather its shards, or its gradients."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return False
    parameters = list(getattr(layer, NAME).parameters())
    sharded = any(isinstance(p, DTensor) for p in parameters)  # by itself: with the layer it is whole by now
    return sharded or (torch.is_grad_enabled() and any(p.requires_grad for p in parameters))


def _may_overwrite(state: Tensor, args: tuple) -> bool:
    """Whether nobody else reads this layer output: it is no view, not the input, and autograd has not saved it."""
    if torch.compiler.is_compiling() or (args and state is args[0]) or state._is_view():
        return False
    if not torch.is_grad_enabled() or not state.requires_grad:
        return True
    # Neither the residual add keeps its result, nor a checkpoint around it.
    return state.grad_fn is not None and state.grad_fn.name() in ("AddBackward0", "CheckpointFunctionBackward")


def _calibrated_layers(model: nn.Module) -> list[Any]:
    layers = [module for module in model.modules() if "_moca" in module.__dict__]
    if not layers:
        raise ValueError("model: has no MoCa; add_moca first")
    return layers


def _module(layer: nn.Module) -> Any:
    """The layer's MoCa, inside PEFT's wrapper if it is among `modules_to_save`."""
    module: Any = getattr(layer, NAME)
    if hasattr(module, "modules_to_save"):
        module = module.modules_to_save[module.active_adapter]
    return module


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _checks.FLOATS:
        takes = ", ".join(str(d).removeprefix("torch.") for d in _checks.FLOATS)
        raise TypeError(f"dtype: takes {takes}, got {dtype}")
    if dtype.itemsize == 2:
        step = torch.finfo(dtype).eps / 4  # half the distance to the next number below
        warnings.warn(
            f"dtype: in {str(dtype).removeprefix('torch.')} a scale of 1 stays 1 under steps smaller than {step:.1g}; "
            "keep float32, in a shard group of its own under fully_shard",
            stacklevel=3,
        )


def _module_for(layer: nn.Module, hidden_size: int, std: float, dtype: torch.dtype | None) -> MoCa:
    wide = any(p.dtype == torch.float64 for p in layer.parameters())
    dtype = dtype or (torch.float64 if wide else torch.float32)
    return MoCa(hidden_size, std=std, device=parameter_device(layer), dtype=dtype)


def _hidden_size(model: nn.Module, decoder: Decoder) -> int:
    weight = getattr(decoder.norm, "weight", None)
    size = getattr(text_config(model), "hidden_size", None) or (weight.shape[-1] if weight is not None else None)
    if size is None:
        raise ValueError("model: neither its configuration nor a final norm says the hidden size")
    return int(size)


def _refuse_sharded(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule | nn.parallel.DistributedDataParallel) or hasattr(
            module, "_fsdp_wrapped_module"
        ):
            raise ValueError(
                f"model: is wrapped by {type(module).__name__} already, which would leave MoCa's gradients "
                "unsynchronised; add MoCa first"
            )


def _read(path: Path) -> dict[tuple[int, str], Tensor]:
    values: dict[tuple[int, str], Tensor] = {}
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


def _tensors(file: Path) -> dict[str, Any]:
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
