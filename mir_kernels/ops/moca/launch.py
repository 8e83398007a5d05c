"""Passes tensors of any shape and strides to the row kernels of a backend.

Every backend module (native, triton, eager, reference) has the same four functions on row-strided matrices (n, d).
Results are new contiguous tensors of x's shape and dtype, except in `forward_`, which changes x.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from mir_kernels._dispatch import Operation
from mir_kernels._precision import accumulator
from mir_kernels.ops.moca.vision_mask import VisionMask

Backend = Literal["cuda", "triton", "native", "eager", "reference"]
FusedBackend = Literal["triton", "native", "eager", "reference"]
MOCA = Operation("moca", orders={"cuda": ("cuda", "triton", "eager"), "cpu": ("native", "eager")})
ADD_MOCA_RMS_NORM = Operation("add_moca_rms_norm", orders={"cuda": ("triton", "eager"), "cpu": ("native", "eager")})
OPERATIONS = (MOCA, ADD_MOCA_RMS_NORM)

_MODULES = {"cuda": "native"}  # one module calls the compiled kernels of both devices


def forward(x: Tensor, scale: Tensor, shift: Tensor, mask: Tensor, backend: str | None) -> Tensor:
    """Eq. 5 into a new tensor."""
    out = _like(x)
    if x.numel():
        _module(0, backend, x.device).forward(_rows(x), scale, shift, _flags(mask), _rows(out))
    return out


def forward_(x: Tensor, scale: Tensor, shift: Tensor, mask: Tensor, backend: str | None) -> None:
    """Eq. 5 in place: only vision rows are read and written. Uses a copy if x cannot be viewed as rows."""
    if not x.numel():
        return
    rows = _rows(x)
    _module(0, backend, x.device).forward(rows, scale, shift, _flags(mask), rows)
    if rows.data_ptr() != x.data_ptr():
        x.copy_(rows.view(x.shape))


def vision_rows(x: Tensor, vision: VisionMask) -> Tensor:
    """A copy of x's vision rows, (count, d)."""
    return _rows(x).index_select(0, vision.places)


def backward(
    grad: Tensor, x: Tensor, scale: Tensor, mask: Tensor, backend: str | None, *, x_rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift), the last two float32 (float64 for float64). Only x's vision rows are read.

    x_rows: if x holds only vision rows, the index in x of each row i of grad (`VisionMask.row_of`).
    """
    dx = _like(grad)
    if not grad.numel():
        return dx, _zero_sum(grad), _zero_sum(grad)
    module = _module(0, backend, grad.device)
    dscale, dshift = module.backward(_rows(grad), _rows(x), scale, _flags(mask), _rows(dx), x_rows)
    return dx, dscale, dshift


def add_rms_forward(
    x: Tensor,
    residual: Tensor,
    scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    weight: Tensor,
    eps: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, h, rstd), rstd of the mask's shape in float32 (float64 for float64)."""
    out, h = _like(x), _like(x)
    rstd = torch.empty(x.shape[:-1], dtype=accumulator(x), device=x.device)
    if x.numel():
        module = _module(1, backend, x.device)
        module.add_rms_forward(
            *(_rows(x), _rows(residual), scale, shift, _flags(mask), weight, eps, _rows(out), _rows(h), rstd.view(-1))
        )
    return out, h, rstd


def add_rms_backward(
    grad_out: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    x: Tensor,
    residual: Tensor,
    scale: Tensor,
    mask: Tensor,
    weight: Tensor,
    rstd: Tensor,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift, dweight), sums in the `accumulator` dtype. Only vision rows of x and residual are read."""
    dx = _like(grad_out)
    if not dx.numel():
        return dx, _zero_sum(dx), _zero_sum(dx), _zero_sum(dx)
    upstream = None if grad_h is None else _rows(grad_h)
    dscale, dshift, dweight = _module(1, backend, dx.device).add_rms_backward(
        *(_rows(grad_out), upstream, _rows(h), _rows(x), _rows(residual)),
        *(scale, _flags(mask), weight, rstd.reshape(-1).contiguous(), _rows(dx)),
    )
    return dx, dscale, dshift, dweight


@functools.cache
def _module(operation: int, backend: str | None, device: torch.device) -> ModuleType:
    """The backend's module. Cached, because the lookup takes microseconds and its result does not change."""
    name = OPERATIONS[operation].choose(backend, device)
    return importlib.import_module(f"mir_kernels.ops.moca.{_MODULES.get(name, name)}")


def _rows(x: Tensor) -> Tensor:
    """x as (n, d) with contiguous rows: a view if the strides allow, else a copy."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _flags(mask: Tensor) -> Tensor:
    """The mask as (n,) bool or uint8, contiguous."""
    flags = mask.ne(0) if mask.is_floating_point() else mask
    return flags if flags.dim() == 1 and flags.is_contiguous() else flags.reshape(-1).contiguous()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _zero_sum(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[-1], dtype=accumulator(x), device=x.device)
