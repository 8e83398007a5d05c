"""Adds MoCa (section 3.4 of the MIR paper) to a vision-language model, at the end of every decoder layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mir_kernels import _checks
from mir_kernels.ops.moca import MoCa
from modality_integration.models.calibration import HELD_AS, Calibration, calibration_of, is_calibrated, unmoved_by
from modality_integration.models.decoder import Layers, find_decoder, hidden_size, refuse_several_streams
from modality_integration.models.forward_watch import ForwardWatch
from modality_integration.models.fused_norm import fuse_layers, next_norm, why_not_fused
from modality_integration.models.placement import ENGINE, ON_META, parameter_device, sharder_of, whole_size

if TYPE_CHECKING:
    from mir_kernels._arrays import Array

NAME = "modality_layernorm"  # the submodule's name on each decoder layer, as in the published checkpoints


@dataclass(frozen=True)
class MoCaSite:
    """One decoder layer's MoCa: the layer's name, the vector length, and the norm that reads its output next.

    plain: None if the layer's last addition, MoCa and that norm are fused, otherwise the reason why they are not.
    """

    layer: str
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    read_by: str | None
    plain: str | None


@dataclass(frozen=True)
class MoCaReport:
    """The result of `add_moca`, one site per decoder layer."""

    sites: tuple[MoCaSite, ...]

    def __str__(self) -> str:
        lines = [f"MoCa at the end of {len(self.sites)} decoder layers"]
        for s in self.sites:
            how = f"fused with {s.read_by}" if s.plain is None else f"read by {s.read_by}, not fused: {s.plain}"
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
    normal(1, std) and normal(0, std). `dtype`: of both; by default float32 (float64 in a float64 model). Keep float32
    in a bf16 model too: steps of 1e-3 do not change a bf16 scale of 1. A warning says so, here or, if the model is cast
    later, at its first training pass. `layers` and `vision_mask` (the name of a forward argument) are as in `capture`;
    to pass a mask of your own, run the model inside `vision_tokens`.

    The vision tokens are read from the model's own marker once per forward pass. Decoding steps and passes without an
    image skip MoCa. If gradients are synchronised between processes, passes without an image still give the parameters
    gradients of zero, because every process must have gradients. Add MoCa before DDP, FSDP, `deepspeed.initialize` and
    torch.compile. It may come before or after accelerate's offloading and PEFT; before `get_peft_model`, list
    `modality_layernorm` in `modules_to_save`, or PEFT freezes it. `fully_shard` requires one dtype per group: shard
    each `modality_layernorm` as a separate group.

    `fused`: if a layer has Llama's form (Llama, Qwen2, Qwen3, Mistral and the decoders of Qwen-VL do), its last
    addition, MoCa and the RMSNorm that reads the sum run as one `add_moca_rms_norm`; the report lists the fused layers
    and why the others are not. Gemma's norms round in another order, so Gemma is not fused. The sum has the same bits
    either way; its norm may differ in the last place of its dtype (see add_moca_rms_norm). Passes in which fusing would
    change results run unfused: under gradient checkpointing, torch.compile and FSDP, with `output_hidden_states` or
    foreign hooks on a layer while gradients are recorded, in autocast, in inference mode.
    Errors: ValueError for a model that already has MoCa, is already wrapped for training, or has a layer entirely on
    the meta device that no accelerate hook fills, and, as in `capture`, for models without vision tokens; TypeError for
    a dtype that is not floating-point, and for a vision_mask that is not a name.
    """
    if not std >= 0:
        raise ValueError(f"std: expected a number >= 0, got {std!r}")
    if vision_mask is not None and not isinstance(vision_mask, str):
        raise TypeError(
            f"vision_mask: expected the name of a forward argument, got {type(vision_mask).__name__}; to pass a mask, "
            "run the model inside vision_tokens(model, mask)"
        )
    if dtype is not None:
        _check_dtype(dtype)
    decoder = find_decoder(model, layers)
    refuse_several_streams(model)
    _refuse_sharded(model)
    if any(hasattr(layer, NAME) for layer in decoder.layers):
        raise ValueError("model: already has MoCa; call remove_moca first")
    size = hidden_size(model, decoder)
    modules = [_module_for(layer, size, std, dtype) for layer in decoder.layers]
    named = ("output_hidden_states", *((vision_mask,) if vision_mask else ()))
    calibration = Calibration(ForwardWatch(model, decoder, named=named), decoder, NAME, size, vision_mask)
    calibration.told_of_dtypes = dtype is not None and dtype.itemsize == 2
    plain = [why_not_fused(model, decoder, i) if fused else "fused=False" for i in range(len(decoder.layers))]
    sites = []
    for i, (layer, name, module) in enumerate(zip(decoder.layers, decoder.names, modules, strict=True)):
        layer.add_module(NAME, module)
        calibration.place(layer)
        read_by, scale = next_norm(decoder, i)[0], module.scale
        sites.append(MoCaSite(name, size, scale.dtype, scale.device, read_by, plain[i]))
    if not all(plain):
        calibration.placed += fuse_layers(decoder, plain, calibration)
    return MoCaReport(tuple(sites))


def remove_moca(model: nn.Module) -> None:
    """Removes MoCa and its hooks from `model`; ValueError if there is none."""
    for layer in calibrated_layers(model):
        calibration_of(layer).remove()
        delattr(layer, HELD_AS)
        del layer._modules[NAME]


def moca_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The scale and shift of every layer, for an optimizer group with weight_decay 0.

    transformers' Trainer already excludes them from weight decay, as it does all names that contain `layernorm`.
    ValueError under FSDP1 with use_orig_params=False: there they are slices of flat parameters.
    """
    modules = [moca_of(layer) for layer in calibrated_layers(model)]
    if any("scale" not in moca._parameters for moca in modules):
        raise ValueError(
            "model: FullyShardedDataParallel with use_orig_params=False keeps scale and shift inside flat parameters, "
            "which no optimizer group can tell apart; use use_orig_params=True"
        )
    return [p for moca in modules for p in moca.parameters()]


@contextmanager
def vision_tokens(model: nn.Module, mask: Array) -> Iterator[None]:
    """Inside the block, MoCa in `model` uses `mask` instead of the model's own marker.

    mask: (B, T), a tensor or an array, as in `mir_kernels.moca`.
    """
    mask = _checks.mask("mask", mask, None, floats=True)
    calibration = calibration_of(calibrated_layers(model)[0])
    before, calibration.vision = calibration.vision, mask
    try:
        yield
    finally:
        calibration.vision = before


def calibrated_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of `model` that hold MoCa, in order; ValueError if there are none."""
    layers = [module for module in model.modules() if is_calibrated(module)]
    if not layers:
        raise ValueError("model: has no MoCa; call add_moca first")
    return layers


def moca_of(layer: nn.Module) -> MoCa:
    """The layer's MoCa inside FSDP and PEFT wrappers: the active adapter's if MoCa is among its `modules_to_save`.

    If no active adapter has MoCa, the layer runs the original one from before PEFT.
    """
    module = _inside_fsdp(getattr(layer, NAME))
    if hasattr(module, "modules_to_save"):
        active = () if module.disable_adapters else module.active_adapter
        names = [active] if isinstance(active, str) else active
        held = [name for name in names if name in module.modules_to_save]
        module = _inside_fsdp(module.modules_to_save[held[0]] if held else module.original_module)
    return module


def _inside_fsdp(module: nn.Module) -> Any:
    return module._modules.get("_fsdp_wrapped_module", module)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _checks.FLOATS:
        expected = ", ".join(str(d).removeprefix("torch.") for d in _checks.FLOATS)
        raise TypeError(f"dtype: expected one of the dtypes {expected}, got {dtype}")
    if dtype.itemsize == 2:
        group = "in a separate shard group under fully_shard"
        warnings.warn(f"dtype: {unmoved_by(dtype)}; keep float32, {group}", stacklevel=3)


def _module_for(layer: nn.Module, size: int, std: float, dtype: torch.dtype | None) -> MoCa:
    wide = any(p.dtype == torch.float64 for p in layer.parameters())
    dtype = dtype or (torch.float64 if wide else torch.float32)
    module = MoCa(size, std=std, device=parameter_device(layer), dtype=dtype)
    if module.scale.is_meta:  # inside accelerate's init_empty_weights
        raise ValueError(f"model: MoCa's scale {ON_META}")
    assert whole_size(module.scale) == size
    return module


def _refuse_sharded(model: nn.Module) -> None:
    """Raises ValueError if a wrapper has already registered the model's parameters for training, without MoCa's."""
    sharder = sharder_of(model)
    if sharder is None:
        return
    if sharder == ENGINE:
        raise ValueError(
            f"model: is already in {ENGINE}, whose optimizer would never update MoCa; add MoCa before "
            "deepspeed.initialize"
        )
    raise ValueError(
        f"model: is already wrapped by {sharder}, which would not synchronise MoCa's gradients; add MoCa first"
    )
