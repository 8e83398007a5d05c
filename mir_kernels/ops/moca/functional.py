"""The public functions: checks, then the shortest possible path to the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta, _get_creation_meta

from mir_kernels import _checks
from mir_kernels._gate import by_operator
from mir_kernels.ops.moca import autograd, launch
from mir_kernels.ops.moca.launch import Backend, FusedBackend
from mir_kernels.ops.moca.vision_mask import VisionMask

if TYPE_CHECKING:
    from mir_kernels._arrays import Array

MASKS = (torch.bool, torch.uint8, *_checks.FLOATS)


def moca(
    x: Array,
    scale: Array,
    shift: Array,
    mask: Array | VisionMask,
    *,
    inplace: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Scale and shift vision tokens (Eq. 5 of the MIR paper): `scale * x + shift` where mask, x bit for bit elsewhere.

    x: (..., d), float32, bfloat16, float16 or float64, any strides, any number of tokens including none.
    scale, shift: (d,), any of these dtypes. mask: (...), bool, uint8 or floating; nonzero marks a vision token. Other
    integer dtypes must contain only 0 and 1; checking them waits for the device. All arguments may be NumPy arrays,
    except x in place.
    inplace: change x and return it; text rows are then neither read nor written. If scale requires grad, the vision
    rows are copied first, and counting them waits for the device. A `VisionMask` is counted once for many calls.
    Backward uses the mask as it was at the call, even if it has been overwritten since.
    Returns a tensor of x's shape and dtype; a new one is contiguous. Arithmetic is in float32 (float64 for float64),
    rounded once. Differentiable once, in x, scale and shift; column sums in float32, with the same bits on every run.
    Raises TypeError or ValueError naming the argument; RuntimeError for a backend that cannot run here.
    """
    flags, shared = _tensor_and_shared(mask)
    if not _sound(x, scale, shift, flags):
        if inplace and not isinstance(x, Tensor):
            raise TypeError(f"x: expected a torch.Tensor to change in place, got {type(x).__name__}")
        x, scale, shift, flags = _explained(x, scale, shift, flags)
    if TYPE_CHECKING:
        assert isinstance(x, Tensor)
        assert isinstance(scale, Tensor)
        assert isinstance(shift, Tensor)
    if by_operator("moca", x, scale, shift, flags):
        # In place, backward must not save the tensor that changes.
        source = x.clone() if inplace and torch.is_grad_enabled() and scale.requires_grad else x
        out = torch.ops.mir_kernels.moca(source, scale, shift, flags, backend)
        return x.copy_(out) if inplace else out
    gradient = torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or shift.requires_grad)
    if inplace:
        _check_writable(x, gradient)
    if gradient:
        return autograd.Moca.apply(x, scale, shift, flags, inplace, backend, shared)
    if not inplace:
        return launch.forward(x, scale, shift, flags, backend)
    launch.forward_(x, scale, shift, flags, backend)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # autograd does not see the kernels' writes
    return x


def add_moca_rms_norm(
    x: Array,
    residual: Array,
    scale: Array,
    shift: Array,
    mask: Array | VisionMask,
    weight: Array,
    *,
    eps: float = 1e-6,
    backend: FusedBackend | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual add, MoCa on vision rows and RMSNorm in one pass, as between two decoder layers.

    h = moca(x + residual, scale, shift, mask); out = weight * h / sqrt(mean(h^2) + eps). Returns (out, h).

    x, residual: (..., d), one dtype. scale, shift, weight: (d,), any floating dtype. mask: (...), as in `moca`.
    Results are rounded to x's dtype after the addition, after MoCa, after the normalisation and after the weight: the
    order of the separate operations and Llama's RMSNorm. rsqrt, mean and all sums are in float32 (float64 for float64).
    Differentiable once, in x, residual, scale, shift and weight. Errors as in `moca`.
    """
    flags, shared = _tensor_and_shared(mask)
    if not _sound(x, scale, shift, flags):
        x, scale, shift, flags = _explained(x, scale, shift, flags)
    if not _fit(x, residual, weight):
        residual, weight = _explained_addition(x, residual, weight)
    if TYPE_CHECKING:
        assert isinstance(x, Tensor)
        assert isinstance(residual, Tensor)
        assert isinstance(scale, Tensor)
        assert isinstance(shift, Tensor)
        assert isinstance(weight, Tensor)
    arguments = (x, residual, scale, shift, flags, weight, float(eps), backend)
    tensors = (x, residual, scale, shift, weight)
    if by_operator("add_moca_rms_norm", *tensors, flags):
        out, h, _ = torch.ops.mir_kernels.add_moca_rms_norm(*arguments)
        return out, h
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        out, h, _ = autograd.AddMocaRmsNorm.apply(*arguments, shared is not None)
    else:
        out, h, _ = launch.add_rms_forward(*arguments)
    return out, h


def _tensor_and_shared(mask: Array | VisionMask) -> tuple[Any, VisionMask | None]:
    """The mask as a tensor, and the VisionMask if the caller passed one."""
    return (mask.mask, mask) if isinstance(mask, VisionMask) else (mask, None)


# Fast path: a call on a few rows takes microseconds, and so do the detailed checks. `_sound` and `_fit` combine all
# checks into one; the detailed ones, which also convert arrays, run only if it fails.


def _sound(x: Any, scale: Any, shift: Any, mask: Any) -> bool:
    try:
        if not (isinstance(x, Tensor) and isinstance(scale, Tensor) and isinstance(shift, Tensor)):
            return False
        shape, device = x.shape, x.device
        size = shape[-1:]
        return (
            isinstance(mask, Tensor)
            and len(size) == 1
            and size[0] > 0
            and x.layout == scale.layout == shift.layout == mask.layout == torch.strided
            and x.dtype in _checks.FLOATS
            and scale.dtype in _checks.FLOATS
            and shift.dtype in _checks.FLOATS
            and mask.dtype in MASKS
            and scale.shape == size
            and shift.shape == size
            and mask.shape == shape[:-1]
            and scale.device == device
            and shift.device == device
            and mask.device == device
        )
    except RuntimeError:  # raised by the shape of a nested tensor
        return False


def _fit(x: Any, residual: Any, weight: Any) -> bool:
    return (
        isinstance(residual, Tensor)
        and isinstance(weight, Tensor)
        and not (residual.is_nested or weight.is_nested)
        and residual.layout == weight.layout == torch.strided
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
        and weight.shape == x.shape[-1:]
        and weight.dtype in _checks.FLOATS
        and weight.device == x.device
    )


def _explained(x: Any, scale: Any, shift: Any, mask: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments as tensors, or the error that says what is wrong."""
    x = _checks.tokens("x", x)
    scale = _checks.vector("scale", scale, x.shape[-1])
    shift = _checks.vector("shift", shift, x.shape[-1])
    mask = _checks.mask("mask", mask, x.shape[:-1], floats=True)
    _checks.same_device("scale", scale, "x", x)
    _checks.same_device("shift", shift, "x", x)
    _checks.same_device("mask", mask, "x", x)
    return x, scale, shift, mask


def _explained_addition(x: Any, residual: Any, weight: Any) -> tuple[Tensor, Tensor]:
    residual = _checks.tokens("residual", residual)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        expected, got = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (x, residual))
        raise ValueError(f"residual: expected x's shape and dtype, {expected}, got {got}")
    weight = _checks.vector("weight", weight, x.shape[-1])
    _checks.same_device("residual", residual, "x", x)
    _checks.same_device("weight", weight, "x", x)
    return residual, weight


def _check_writable(x: Tensor, gradient: bool) -> None:
    """Check that x can be changed in place before anything is written; autograd would raise only afterwards."""
    if gradient and x.requires_grad:
        base = x._base if x._is_view() else x
        if base is not None and base.is_leaf and base.requires_grad:
            raise RuntimeError("x: a leaf that requires grad cannot be changed in place; use inplace=False")
    if gradient and x._is_view() and _get_creation_meta(x) != CreationMeta.DEFAULT:
        raise RuntimeError(
            "x: a view made by unbind, split or chunk, or without gradients, cannot be changed in place while "
            "gradients are recorded; use inplace=False"
        )
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("x: a tensor made in inference mode cannot be changed in place outside it; clone it first")
    if not x.is_contiguous() and _may_overlap(x):
        raise ValueError(f"x: an expanded tensor cannot be changed in place, got strides {x.stride()}; clone it first")


def _may_overlap(x: Tensor) -> bool:
    """Whether two elements may share memory: the stride of an axis is within the span of the axes with smaller ones."""
    span = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= span:
            return True
        span += stride * (size - 1)
    return False
