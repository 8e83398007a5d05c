"""Token norms and the block update of the second moment in plain torch: BLAS on a CPU; runs on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from mir_kernels._precision import float32_products
from mir_kernels.ops.moments.packed import add_outer, panels

CHUNK = 256  # rows shifted at a time, so that both passes over a chunk stay in cache
# Rows per float32 sum of products; these sums are then added. A sum of n products may have an error of
# n 2^-24 sigma_i sigma_j if the first product swamps the others.
RUN = 128


def token_norms(x: Tensor) -> Tensor:
    """l2 norms over the last axis, float32; squared and added in float64 to avoid intermediate overflow."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).float()


def accumulate(
    second: Tensor, x: Tensor, mask: Tensor | None, centre: Tensor, vectors: Tensor, weights: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """second += sum_r weights[r] vectors[r] vectors[r]^T + sum_t (x_t - shift)(x_t - shift)^T over the rows where mask.

    second: packed triangle, float64, in place. x: (rows, d). mask: (rows,) bool, or None for all rows.
    centre: (d,) float64, near the rows' mean. vectors (r, d), weights (r,): float64, deferred from the last block.
    Returns the shift used and sum_t (x_t - shift), both (d,) float64. The products are float64 if precision is "exact"
    or x is float64, otherwise float32.
    """
    d = x.shape[1]
    dtype = torch.float64 if precision == "exact" or x.dtype == torch.float64 else torch.float32
    shift = centre.to(dtype)
    y = _shifted(x, mask, shift)
    add_outer(second, d, vectors, weights)
    with float32_products(x.device, dtype):
        for start, stop, panel in panels(second, d):
            if dtype == torch.float64:
                panel.addmm_(y[:, start:stop].T, y[:, :stop])
            else:
                panel += _product(y[:, start:stop], y[:, :stop])
    return shift.double(), y.sum(0).double()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, float32, in runs of rows."""
    total = torch.mm(left[:RUN].T, right[:RUN])
    for a, b in zip(left[RUN:].split(RUN), right[RUN:].split(RUN), strict=True):
        total += torch.mm(a.T, b)  # not addmm: a library may continue the sum in `total`
    return total


def _shifted(x: Tensor, mask: Tensor | None, shift: Tensor) -> Tensor:
    """x - shift in shift's dtype, zero in rows outside the mask."""
    y = torch.empty(x.shape, dtype=shift.dtype, device=x.device)
    step = CHUNK if x.device.type == "cpu" else x.shape[0]
    for start in range(0, x.shape[0], step):
        part = y[start : start + step].copy_(x[start : start + step]).sub_(shift)
        if mask is not None:
            part.masked_fill_(~mask[start : start + step, None], 0.0)
    return y
