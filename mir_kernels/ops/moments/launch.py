"""Passes checked tensors to the kernels of a backend."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from mir_kernels._dispatch import Operation

Backend = Literal["triton", "native", "eager", "reference"]
_ORDERS = {"cuda": ("triton", "eager"), "cpu": ("native", "eager")}
TOKEN_NORMS = Operation("token_norms", orders=_ORDERS)
STREAMING_MOMENTS = Operation("streaming_moments", orders=_ORDERS)
OPERATIONS = (TOKEN_NORMS, STREAMING_MOMENTS)


def token_norms(x: Tensor, backend: str) -> Tensor:
    """Norms of x (..., d) as float32 (...)."""
    kernel = _module(backend).token_norms
    if backend in ("eager", "reference"):
        return kernel(x)
    rows = x.reshape(-1, x.shape[-1])
    return kernel(rows if rows.stride(1) == 1 else rows.contiguous()).view(x.shape[:-1])


def block_update(backend: str, precision: str, dtype: torch.dtype) -> ModuleType:
    """The module whose `accumulate` adds a block of tokens of `dtype` to a second moment."""
    in_float32 = precision != "exact" and dtype != torch.float64
    # Products in float64 use BLAS, whatever the backend.
    return _module(backend if in_float32 or backend == "reference" else "eager")


@functools.cache  # import_module takes microseconds
def _module(backend: str) -> ModuleType:
    return importlib.import_module(f"mir_kernels.ops.moments.{backend}")  # imported late, because triton is optional
