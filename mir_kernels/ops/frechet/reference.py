"""Float64 reference of Tr((AB)^(1/2)): singular values of float64 roots; used only when asked for by name."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels.ops.frechet.linalg import nuclear_norm, witness
from mir_kernels.ops.frechet.report import TraceReport
from mir_kernels.ops.sqrtm.reference import sqrtm

__all__ = ["nuclear_norm", "trace", "trace_sqrt_product", "witness"]


def trace_sqrt_product(a: Tensor, b: Tensor) -> Tensor:
    """Tr((AB)^(1/2)) as the sum of the singular values of A^(1/2) B^(1/2), float64."""
    return torch.linalg.svdvals(sqrtm(a) @ sqrtm(b)).sum(-1)


def trace(a: Tensor, b: Tensor, precision: str, backend: str, indefinite: float) -> TraceReport:
    """`trace_sqrt_product` with the signature that `launch` calls."""
    value = trace_sqrt_product(a, b)
    return TraceReport(value, torch.full_like(value, 1e-8), ("reference",) * value.shape[0])
