"""The registered operator of `trace_sqrt_product`. Nothing here has a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._registration import register
from mir_kernels.ops.frechet import launch


def _like(a: Tensor, b: Tensor, precision: str, bounds: bool, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    value = a.new_empty(a.shape[:-2], dtype=torch.float64)
    lower, upper = (a.new_empty(a.shape[:-2] if bounds else (0,), dtype=torch.float64) for _ in range(2))
    return value, lower, upper


register(
    "trace_sqrt_product(Tensor a, Tensor b, str precision, bool bounds, str backend) -> (Tensor, Tensor, Tensor)",
    launch.trace_sqrt_product,
    _like,
)
trace_sqrt_product = torch.ops.mir_kernels.trace_sqrt_product
